--- `halo version`: this tree and what it runs on.
local M = {
  name = "version",
  summary = "Say which Halo this is.",
  example = "halo version",
}

function M.define() end

function M.run()
  local halo = require "halo"
  print(("halo %s (%s)"):format(halo.version, jit.version))
end

return M
