-- Encode lines of hexadecimal text; the Halo side of tokenizer_peer.py.
-- usage: luajit encode.lua FOLDER special|plain < hex-lines > id-lines
--        luajit encode.lua FOLDER byte          saves the byte tokenizer there first
local root = arg[0]:gsub("[^/]*$", "") .. "../../"
package.path = root .. "lua/?.lua;" .. root .. "lua/?/init.lua;" .. package.path
local tokenizer = require "halo.tokenizer"
if arg[2] == "byte" then tokenizer.byte({}):save(arg[1]) end
local tok = tokenizer.load(arg[1])
for line in io.lines() do
  local text = line:gsub("%x%x", function(h) return string.char(tonumber(h, 16)) end)
  io.write(table.concat(tok:encode(text, { special = arg[2] ~= "plain" }), " "), "\n")
end
