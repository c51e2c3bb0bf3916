--- `halo bench NAME`: how fast is this machine, and how near its own limits do we come?
local cli = require "halo.cli"
local errors = require "halo.errors"

local M = {
  name = "bench",
  summary = "Measure speed: products, ops, attention, a whole training step.",
  example = "halo bench step device=cuda model=qwen2.5-3b tokens=32768",
}

function M.define(command)
  command:argument("what", "one of those listed by `halo bench` alone"):args "?"
  command:argument("options", "its options, as tokens=4096"):args "*"
  command:option("--threads", "threads to measure with (default: all)"):convert(cli.count):argname "N"
  command:flag("--json", "the figures as JSON")
  command:option("--output", "write the figures as JSON to this file as well"):argname "FILE"
end

-- "tokens=4096" -> { tokens = 4096 }, typed by what the benchmark says of its options.
local function options_of(words, known)
  local overrides, others = cli.split_overrides(words)
  if #others > 0 then
    errors.raise("usage", ('"%s" is no option; write name=value, as tokens=4096'):format(others[1]), 0)
  end
  local out = {}
  for _, text in ipairs(overrides) do
    local name, value = text:match "^([%w_]+)=(.*)$"
    local field = known[name]
    local kind = type(field) == "table" and field[1] or field
    local is_text = type(kind) == "string" and kind:find "string" ~= nil
    if value == "true" or value == "false" then
      out[name] = value == "true"
    else
      out[name] = not is_text and cli.number(value) or value
    end
  end
  return out
end

local function list()
  local bench = require "halo.bench"
  for _, name in ipairs(bench.names()) do
    local b = bench.get(name)
    local words = {}
    for _, option in ipairs(require("halo.args").keys(b.options)) do
      local field = b.options[option]
      words[#words + 1] = type(field) == "table" and ("%s=%s"):format(option, tostring(field[2])) or option
    end
    print(("%-10s %s\n           %s"):format(name, b.summary, table.concat(words, " ")))
  end
end

function M.run(options)
  if not options.what then return list() end
  local bench = require "halo.bench"
  local fields = options_of(options.options, bench.get(options.what).options)
  fields.threads = options.threads
  local result = bench.run(options.what, fields)
  if options.output then require("halo.fs").write(options.output, bench.json(options.what, result)) end
  io.stdout:write(options.json and bench.json(options.what, result) or tostring(result) .. "\n")
end

return M
