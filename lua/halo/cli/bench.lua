--- `halo bench WHAT`: measure this machine.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"

local M = {
  name = "bench",
  summary = "Measure: products, ops, attention, a whole training step.",
  example = "halo bench step --json step.json",
}

function M.define(command)
  local bench = require "halo.bench"
  local names = bench.names()
  command:argument("what", "one of: " .. table.concat(names, ", ")):choices(names)
  command:argument("options", "of that benchmark, as name=value; --list shows them"):args "*"
  command:option("--json", "write the numbers there, too"):argname "FILE"
  command:option("--threads -t", "threads to use (default: all)"):argname "N":convert(tonumber)
  command:flag("--list -l", "show the options of the benchmark and their defaults")
end

-- "tokens=2048" by the type that the benchmark wants.
local function parse(words, known, what)
  local out = {}
  for _, word in ipairs(words) do
    local name, value = word:match "^([%w_]+)=(.*)$"
    local spec = name and known[name]
    if not spec then
      errors.raise("usage", ('bench %s: "%s" is no option%s'):format(what, word,
        args.did_you_mean(name or word, args.keys(known))), 0)
    end
    local kind = (type(spec) == "table" and spec[1] or spec):gsub("%?$", "")
    if kind == "boolean" then
      out[name] = value == "true" or value == "1" or value == "yes"
    elseif kind == "string" then
      out[name] = value
    else
      out[name] = tonumber(value)
      if not out[name] then
        errors.raise("usage", ("bench %s: %s wants a number, got %q"):format(what, name, value), 0)
      end
    end
  end
  return out
end

function M.run(options)
  local bench = require "halo.bench"
  local known = bench.get(options.what).options
  if options.list then
    for _, name in ipairs(args.keys(known)) do
      local spec = known[name]
      print(("%-12s %s"):format(name, type(spec) == "table" and tostring(spec[2]) or "(optional)"))
    end
    return 0
  end
  local o = parse(options.options, known, options.what)
  o.threads = options.threads
  local result = bench.run(options.what, o)
  local m = result.machine
  print(("%s, %d thread%s, load average %.1f at the start"):format(m.cpu, m.threads, m.threads == 1 and "" or "s",
    m.load or 0))
  print(result)
  if options.json then fs.write(options.json, bench.json(options.what, result)) end
end

return M
