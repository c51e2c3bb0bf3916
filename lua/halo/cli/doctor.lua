--- `halo doctor`: is this machine ready?
local errors = require "halo.errors"
local term = require "halo.term"

local M = {
  name = "doctor",
  summary = "Look at this machine: what is here, what is missing, does the engine compute right.",
  example = "halo doctor --parity",
}

function M.define(command)
  command:flag("--parity", "prove that a ring of ranks computes what one rank does, in fp64 and fp32")
  command:flag("--json", "checks and facts as JSON")
end

local colors = { ok = "green", warn = "yellow", FAIL = "red" }

local function print_check(check)
  print(("%s %s %s"):format(term.paint(colors[check.status], term.pad(check.status, 4)), term.pad(check.name, 10),
    check.text))
  if check.fix and check.status ~= "ok" then print("                fix: " .. check.fix) end
end

function M.run(options)
  local doctor = require "halo.doctor"
  local checks = doctor.run()
  if not options.json then
    for _, check in ipairs(checks) do print_check(check) end
  end
  if options.parity then
    local bar = require("halo.progress").new { total = 8, label = "parity" }
    local proofs = doctor.parity { progress = function(done) bar:update(done) end }
    bar:done()
    for _, check in ipairs(proofs) do
      checks[#checks + 1] = check
      if not options.json then print_check(check) end
    end
  end
  if options.json then
    print(require("halo.json").encode({ checks = checks, environment = doctor.environment() }, { pretty = true }))
  end
  for _, check in ipairs(checks) do
    if check.status == "FAIL" then return errors.exit_codes.environment end
  end
end

return M
