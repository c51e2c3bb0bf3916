-- Encode lines of hexadecimal text; the Halo side of tokenizer_peer.py.
-- usage: luajit encode.lua FOLDER special|plain < hex-lines > id-lines
local root = arg[0]:gsub("[^/]*$", "") .. "../../"
package.path = root .. "lua/?.lua;" .. root .. "lua/?/init.lua;" .. package.path
local tok = require("halo.tokenizer").load(arg[1])
for line in io.lines() do
  local text = line:gsub("%x%x", function(h) return string.char(tonumber(h, 16)) end)
  io.write(table.concat(tok:encode(text, { special = arg[2] == "special" }), " "), "\n")
end
