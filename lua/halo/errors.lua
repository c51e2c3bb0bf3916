--- Error values, and what the shell is told about them.
-- An error in Halo is a small table: the text, a class, and for engine failures the status code. It
-- prints as its text, so `print(err)`, `tostring(err)` and `..` work as with plain strings, and a
-- caller that wants to tell "no memory" from "bad file" looks at `err.class` instead of matching
-- words. Plain string errors stay welcome: `errors.wrap` turns whatever was raised into one shape.
local M = {}

--- Exit code of the program for each class (reference: `halo help exit-codes`).
M.exit_codes = {
  usage = 2, -- command line or recipe
  environment = 3, -- this machine lacks something
  memory = 4,
  data = 5, -- a file cannot be read, or contradicts itself
  communication = 6,
  numerics = 7,
  internal = 70,
  preempted = 75, -- saved a checkpoint on request; start me again
}

-- Engine status (core/halo.h) -> class. HALO_EARG is `internal` because a wrong argument that comes
-- from a recipe is caught earlier by the schema, with file and line.
M.status_classes = {
  [-1] = "internal", -- HALO_EARG
  [-2] = "memory", -- HALO_ENOMEM
  [-3] = "data", -- HALO_EIO
  [-4] = "data", -- HALO_ECORRUPT
  [-5] = "data", -- HALO_EVERSION
  [-6] = "environment", -- HALO_ECUDA
  [-7] = "communication", -- HALO_ECOMM
  [-8] = "internal", -- HALO_ESTATE
  [-9] = "environment", -- HALO_EUNSUPPORTED
  [-10] = "numerics", -- HALO_ENUMERIC
  [-11] = "preempted", -- HALO_EINTERRUPTED
}

local Error = {}
Error.__index = Error
Error.__tostring = function(e) return e.where and (e.where .. " " .. e.message) or e.message end
Error.__concat = function(a, b) return tostring(a) .. tostring(b) end

--- String methods on the text, so that code written for string errors keeps working.
function Error:match(...) return tostring(self):match(...) end
function Error:find(...) return tostring(self):find(...) end

-- "file:line:" of the function `level` frames above the caller, or nil (C, or a tail call).
local function position(level)
  local info = debug.getinfo(level + 1, "Sl")
  if info and info.currentline > 0 then return info.short_src .. ":" .. info.currentline .. ":" end
end

--- Make an error value without raising it.
-- @tparam table o `message`, `class` (a key of `exit_codes`), and optionally `code` (engine status),
-- `name` (its name), `where` ("file:line:"), `hint` (what to try next)
function M.new(o) return setmetatable(o, Error) end

--- Raise an error of a class.
-- @tparam string class a key of `exit_codes`
-- @tparam string message names the function, what came and what was wanted
-- @tparam[opt=1] int level frame to blame, as in `error`; 0 adds no position
function M.raise(class, message, level)
  level = level or 1
  local where = level > 0 and position(level + 1) or nil
  error(M.new { message = message, class = class, where = where }, 0)
end

--- True for values made by this module.
function M.is(e) return getmetatable(e) == Error end

--- One shape for anything that `pcall` may hand over.
function M.wrap(e)
  if M.is(e) then return e end
  local text = tostring(e)
  -- LuaJIT's own out-of-memory error carries no code.
  return M.new { message = text, class = text == "not enough memory" and "memory" or "internal" }
end

--- Exit code for anything that `pcall` may hand over.
function M.exit_code(e) return M.exit_codes[M.wrap(e).class] or 70 end

return M
