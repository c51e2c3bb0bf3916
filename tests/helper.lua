--- Loaded by busted before any spec (`--helper=tests/helper.lua`).
-- Loads the engine once, because a C type can be declared only once per process while busted reloads
-- modules for every file, and puts the Lua tree on the path when busted was started by hand.
local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")
local root = here .. "../"
if not package.path:find(root .. "lua/?.lua", 1, true) then
  package.path = root .. "lua/?.lua;" .. root .. "lua/?/init.lua;" .. package.path
end

require "halo"
require "halo.ffi"
require "halo.ops" -- and halo.tensor, whose metatype can be set once per process
require "halo.autograd" -- holds the functions that backward runs again

-- Run specs with another default device: HALO_TEST_DEVICE=cuda busted ...
local device = os.getenv "HALO_TEST_DEVICE"
if device and device ~= "" then require "halo.device"(device) end

local M = {}

--- Root of the checkout, with a slash.
M.root = root

--- Folder of shared reference data: `HALO_SHARED`, or `../shared` beside the checkout; nil when absent.
function M.shared()
  local fs = require "halo.fs"
  for _, path in ipairs { os.getenv "HALO_SHARED" or "", root .. "../shared" } do
    if path ~= "" and fs.is_dir(path) then return path end
  end
end

package.loaded["tests.helper"] = M
return M
