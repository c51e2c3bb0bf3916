--- Weights in Hugging Face's safetensors format.
-- Files are taken to be hostile: the engine checks headers, ranges, shards and names before it believes
-- any of it (core/safetensors.c lists what is refused).
--
--    local st = require "halo.safetensors"
--    local file = st.open "models/Qwen2.5-0.5B"        -- a file, a folder, or an index of shards
--    print(file)                                        -- what is in it
--    local w = file:read("model.norm.weight", { dtype = "f32" })
--    file:read("model.embed_tokens.weight", { into = embedding })
--    st.save("out", { ["model.norm.weight"] = w }, { dtype = "bf16" })
local ffi = require "ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local tensor = require "halo.tensor"

local C, call, call_at, check = halo_ffi.C, halo_ffi.call, halo_ffi.call_at, halo_ffi.check

local File = {}
File.__index = File

local M = {}

--- Largest shard of a model that is saved into a folder, in bytes (Transformers 4 used the same).
M.max_shard_bytes = 5e9

local slot = ffi.new "halo_safetensors *[1]"
local info_slot = ffi.new "halo_safetensors_info[1]"

--- Open a file, an index (`*.index.json`), or a folder that holds `model.safetensors` or
-- `model.safetensors.index.json`. All headers are read and checked now.
-- @tparam string path
-- @tparam[opt] table o `follow_links = true` allows symbolic links, which snapshots in the Hugging Face
-- cache are made of
-- @treturn File
-- @raise class data (or internal, for what is no regular file and for pickles), with the reason
function M.open(path, o)
  o = args.named("safetensors.open", o or {}, { follow_links = { "boolean", false } })
  call(C.halo_safetensors_open, slot, path, o.follow_links and 1 or 0)
  return setmetatable({ path = path, handle = ffi.gc(slot[0], C.halo_safetensors_free) }, File)
end

local function handle_of(self)
  if not self.handle then errors.raise("usage", self.path .. " was closed", 3) end
  return self.handle
end

--- Names of all tensors, sorted.
function File:names()
  local handle, names = handle_of(self), {}
  for i = 1, tonumber(C.halo_safetensors_count(handle)) do
    check(C.halo_safetensors_describe(info_slot, handle, i - 1))
    names[i] = ffi.string(info_slot[0].name)
  end
  return names
end

--- What is known of a tensor without reading it.
-- @tparam string name
-- @treturn ?table `name`, `code` (the file's dtype: "F32", "F8_E4M3"), `dtype` (ours with the same bytes, or
-- nil), `shape`, `count`, `bytes`, `file`, `offset` in it; nil when there is no such tensor
function File:info(name)
  local handle = handle_of(self)
  local index = C.halo_safetensors_find(handle, name)
  if index < 0 then return nil end
  check(C.halo_safetensors_describe(info_slot, handle, index))
  local info, shape = info_slot[0], {}
  for d = 1, info.ndim do shape[d] = tonumber(info.shape[d - 1]) end
  return {
    name = name, code = ffi.string(info.code), dtype = tensor.dtypes[info.dtype + 1], shape = shape,
    count = tonumber(info.count), bytes = tonumber(info.bytes), file = ffi.string(info.file),
    offset = tonumber(info.offset),
  }
end

-- The dtype a tensor becomes when nobody asked for one: its own, or the narrowest that holds it.
local natural = { F16 = "f32", F8_E4M3 = "f32", F8_E5M2 = "f32", BOOL = "u8", I8 = "i32", I16 = "i32", U16 = "i32",
  U32 = "i64", U64 = "i64" }

--- Read a tensor.
-- @tparam string name
-- @tparam[opt] table o `into` (a tensor of the same shape: filled and returned), or `dtype` (default: the
-- file's own where we have it) and `device` of a new one
-- @treturn Tensor
function File:read(name, o)
  o = args.named("safetensors read", o or {}, { into = "cdata?", dtype = "string?", device = { "string", "cpu" } })
  local handle = handle_of(self)
  local index = C.halo_safetensors_find(handle, name)
  if index < 0 then
    errors.raise("data", ("%s holds no tensor %q%s"):format(self.path, name, args.did_you_mean(name, self:names())), 2)
  end
  local into = o.into
  if into then
    tensor.check(into, "into", 2)
  else
    local info = self:info(name)
    local dtype = o.dtype or info.dtype or natural[info.code]
    if not dtype then
      errors.raise("data", ("%s: tensor %s is %s, which Halo does not compute with"):format(self.path, name,
        info.code), 2)
    end
    into = tensor.new { shape = info.shape, dtype = dtype, device = o.device }
  end
  call_at(2, C.halo_safetensors_load, into, handle, index)
  return into
end

--- The file's `__metadata__`: a table of strings.
function File:metadata()
  local handle, out = handle_of(self), {}
  for i = 1, tonumber(C.halo_safetensors_metadata_count(handle)) do
    local key = C.halo_safetensors_metadata_key(handle, i - 1)
    out[ffi.string(key)] = ffi.string(C.halo_safetensors_metadata(handle, key))
  end
  return out
end

--- Give the memory of the headers back now instead of when the collector finds it.
function File:close()
  if not self.handle then return end
  C.halo_safetensors_free(ffi.gc(self.handle, nil))
  self.handle = nil
end

File.__tostring = function(self)
  if not self.handle then return "safetensors " .. self.path .. " (closed)" end
  local lines, bytes = {}, 0
  local names = self:names()
  for i, name in ipairs(names) do
    local info = self:info(name)
    bytes = bytes + info.bytes
    if i <= 20 then lines[#lines + 1] = ("  %-48s %-6s [%s]"):format(name, info.code, table.concat(info.shape, ",")) end
  end
  if #names > 20 then lines[#lines + 1] = ("  and %d more"):format(#names - 20) end
  return ("safetensors %s: %d tensors, %.1f MB\n%s"):format(self.path, #names, bytes / 1e6, table.concat(lines, "\n"))
end

-- ---- saving -------------------------------------------------------------------------------------

local codes = { f64 = "F64", f32 = "F32", bf16 = "BF16", f16 = "F16", i32 = "I32", i64 = "I64", u8 = "U8" }
local is_float = { f64 = true, f32 = true, bf16 = true }

local writer_slot = ffi.new "halo_safetensors_writer *[1]"

--- Collect tensors into an engine writer; checkpoints use this too.
-- @tparam table tensors name -> tensor
-- @tparam table o `dtype` for floating tensors ("f32", "bf16", "f16", "f64"; default: each its own),
-- `metadata` (table of strings)
-- @return a `halo_safetensors_writer *` with its finalizer
function M.writer(tensors, o)
  if o.dtype and not (codes[o.dtype] and (is_float[o.dtype] or o.dtype == "f16")) then
    errors.raise("usage", ("safetensors: dtype must be f64, f32, bf16 or f16, got %s"):format(
      args.describe(o.dtype)), 3)
  end
  call(C.halo_safetensors_writer_new, writer_slot)
  local writer = ffi.gc(writer_slot[0], C.halo_safetensors_writer_free)
  for _, key in ipairs(args.keys(o.metadata or {})) do
    call(C.halo_safetensors_writer_metadata, writer, key, tostring(o.metadata[key]))
  end
  for _, name in ipairs(args.keys(tensors)) do
    local t = tensor.check(tensors[name], name, 3)
    call(C.halo_safetensors_writer_add, writer, name, t, o.dtype and is_float[t.dtype] and codes[o.dtype] or nil)
  end
  return writer
end

--- Save tensors where Transformers and everybody else can read them.
-- @tparam string path ends in `.safetensors`: one file; else a folder, made if missing, that gets
-- `model.safetensors` or shards and an index. What it replaces stays until the new files are on the device.
-- @tparam table tensors name -> tensor
-- @tparam[opt] table o `dtype` (of floating tensors in the file, "f32", "bf16", "f16", "f64"), `metadata`
-- (strings; `format = "pt"` is there by itself), `max_shard_bytes` (default `M.max_shard_bytes`; 0: one file)
function M.save(path, tensors, o)
  o = args.named("safetensors.save", o or {}, { dtype = "string?", metadata = "table?",
    max_shard_bytes = { "number", M.max_shard_bytes } })
  local writer = M.writer(tensors, o)
  fs.mkdir(fs.dirname(path))
  call(C.halo_safetensors_writer_save, writer, path, o.max_shard_bytes)
  C.halo_safetensors_writer_free(ffi.gc(writer, nil)) -- it holds the tensors: do not wait for the collector
end

return M
