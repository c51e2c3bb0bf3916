--- TensorBoard event files, written without TensorBoard.
--
-- A file is a sequence of records:  u64 length | u32 masked crc32c(length) | bytes | u32 masked crc32c(bytes)
-- with mask(crc) = ((crc >> 15) | (crc << 17)) + 0xa282ead8, and the bytes are a protobuf `Event`:
--    wall_time = 1 (double), step = 2 (int64), file_version = 3 ("brain.Event:2"), summary = 5
--    Summary { value = 1 { tag = 1, simple_value = 2 (float) } }
-- Source: the TensorFlow guide "TFRecords format details" and tensorboard/compat/proto/event.proto.
local bit = require "bit"
local ffi = require "ffi"
local fs = require "halo.fs"

local M = {}

---- CRC-32C (Castagnoli, polynomial 0x1EDC6F41, reflected), by table -------------------------------

local crc_table = ffi.new "uint32_t[256]"
for i = 0, 255 do
  local c = i
  for _ = 1, 8 do
    local carry = bit.band(c, 1) == 1
    c = bit.rshift(c, 1)
    if carry then c = bit.bxor(c, 0x82f63b78) end
  end
  crc_table[i] = ffi.cast("uint32_t", c)
end

--- CRC-32C of a string, as an unsigned number.
function M.crc32c(s)
  local c = -1
  for i = 1, #s do
    c = bit.bxor(bit.tobit(crc_table[bit.band(bit.bxor(c, s:byte(i)), 255)]), bit.rshift(c, 8))
  end
  return bit.bnot(c) % 2 ^ 32
end

local function masked(s)
  local crc = M.crc32c(s)
  local rotated = (math.floor(crc / 32768) + crc * 131072) % 2 ^ 32
  return (rotated + 0xa282ead8) % 2 ^ 32
end

---- Little-endian and protobuf -------------------------------------------------------------------

local function little(n, bytes)
  local out = {}
  for i = 1, bytes do
    out[i] = string.char(n % 256)
    n = math.floor(n / 256)
  end
  return table.concat(out)
end

local function varint(n)
  local out = {}
  repeat
    local low = n % 128
    n = math.floor(n / 128)
    out[#out + 1] = string.char(n > 0 and low + 128 or low)
  until n == 0
  return table.concat(out)
end

local function double(x) return ffi.string(ffi.new("double[1]", x), 8) end
local function float(x) return ffi.string(ffi.new("float[1]", x), 4) end
local function bytes_field(number, s) return varint(number * 8 + 2) .. varint(#s) .. s end

local function record(s)
  local length = little(#s, 8)
  return length .. little(masked(length), 4) .. s .. little(masked(s), 4)
end

--- Bytes of one event with scalar values.
-- @tparam number wall_time seconds since 1970
-- @tparam int step
-- @tparam table scalars name -> number, written in name order
function M.event(wall_time, step, scalars)
  local names = {}
  for name in pairs(scalars) do names[#names + 1] = name end
  table.sort(names)
  local values = {}
  for i, name in ipairs(names) do
    values[i] = bytes_field(1, bytes_field(1, name) .. "\21" .. float(scalars[name])) -- field 2, 32 bits
  end
  return record("\9" .. double(wall_time) .. "\16" .. varint(step) .. bytes_field(5, table.concat(values)))
end

local Writer = {}
Writer.__index = Writer

--- Open a new event file in a folder (TensorBoard reads all of a folder's files as one run).
function M.open(folder)
  fs.mkdir(folder)
  local now = os.time()
  local path = ("%s/events.out.tfevents.%d.halo.%d"):format(folder, now, fs.pid and fs.pid() or 0)
  local file = assert(io.open(path, "ab"))
  file:write(record("\9" .. double(now) .. bytes_field(3, "brain.Event:2")))
  return setmetatable({ file = file, path = path }, Writer)
end

function Writer:scalars(step, scalars)
  self.file:write(M.event(os.time(), step, scalars))
end

function Writer:flush() self.file:flush() end

function Writer:close()
  if self.file then self.file:close() end
  self.file = nil
end

return M
