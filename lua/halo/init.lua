--- `require "halo"`: everything, loaded when first named.
-- `halo.tensor` is `require "halo.tensor"`, `halo.ops` is `require "halo.ops"`, and so on for every
-- file of this folder; nothing is loaded before it is used, so that `halo --help` starts in
-- milliseconds and a program that reads tokens never opens MPI.
-- @usage local halo = require "halo"; print(halo.json.encode { context = 32 * halo.K })
local args = require "halo.args"

local M = {
  --- The version of this tree.
  version = "0.1.0",
  --- Units: token counts are written in binary thousands (32*K = 32768), amounts of data in decimal
  -- millions and billions (0.5*B tokens), as the papers do.
  K = 1024,
  M = 1e6,
  B = 1e9,
}

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")

--- Names of the modules in this folder, sorted.
function M.modules()
  local fs = require "halo.fs"
  local names = {}
  for _, file in ipairs(fs.list(here)) do
    local name = file:match "^([%w_]+)%.lua$"
    if name and name ~= "init" then names[#names + 1] = name end
  end
  return names
end

-- Functions used so often that they go without their module's name.
local short = { scope = "memory", keep = "memory", no_grad = "autograd" }

return setmetatable(M, {
  __index = function(self, name)
    if type(name) ~= "string" then return nil end
    if short[name] then
      rawset(self, name, require("halo." .. short[name])[name])
      return rawget(self, name)
    end
    if not package.searchpath("halo." .. name, package.path) then
      error(('halo has no module "%s"%s'):format(name, args.did_you_mean(name, self.modules())), 2)
    end
    local module = require("halo." .. name)
    rawset(self, name, module)
    return module
  end,
  __tostring = function(self) return "Halo " .. self.version end,
})
