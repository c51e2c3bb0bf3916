local helper = require "tests.helper"
local fs = require "halo.fs"
local st = require "halo.safetensors"
local tensor = require "halo.tensor"

describe("safetensors", function()
  local dir
  setup(function() dir = fs.temp_dir() end)
  teardown(function() fs.remove_tree(dir) end)

  local function values(t) return t:totable() end

  it("gives back what was saved", function()
    local w = tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    local path = dir .. "/a.safetensors"
    st.save(path, { w = w, t = w:transpose(1, 2), ids = tensor.arange(4) }, { metadata = { note = "x" } })
    local file = st.open(path)
    assert.same({ "ids", "t", "w" }, file:names())
    assert.same({ format = "pt", note = "x" }, file:metadata())
    local info = file:info "w"
    assert.same({ 2, 3 }, info.shape)
    assert.equal("F32", info.code)
    assert.equal("f32", info.dtype)
    assert.equal(24, info.bytes)
    assert.is_nil(file:info "absent")
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, values(file:read "w"))
    assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, values(file:read "t"))
    assert.same({ 0, 1, 2, 3 }, values(file:read "ids"))
    local into = tensor.zeros { 2, 3, dtype = "f64" }
    assert.equal(into, file:read("w", { into = into }))
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, values(into))
    assert.equal("bf16", file:read("w", { dtype = "bf16" }).dtype)
    assert.truthy(tostring(file):find("3 tensors", 1, true))
    file:close()
    file:close()
    assert.has_error(function() file:names() end)
  end)

  it("narrows floats on request and leaves integers alone", function()
    local path = dir .. "/half.safetensors"
    st.save(path, { w = tensor { 0.5, 1.5 }, ids = tensor.arange(2) }, { dtype = "f16" })
    local file = st.open(path)
    assert.equal("F16", file:info("w").code)
    assert.equal("I64", file:info("ids").code)
    assert.same({ 0.5, 1.5 }, values(file:read "w"))
    assert.equal("f32", file:read("w").dtype)
  end)

  it("shards a folder and reads it as one", function()
    local tensors = {}
    for i = 1, 5 do tensors["layer." .. i] = tensor.full { 10, value = i } end
    st.save(dir .. "/m", tensors, { max_shard_bytes = 80 })
    assert.is_true(fs.is_file(dir .. "/m/model-00003-of-00003.safetensors"))
    local file = st.open(dir .. "/m")
    assert.equal(5, #file:names())
    assert.equal(4, values(file:read "layer.4")[10])
  end)

  it("explains what is wrong", function()
    local path = dir .. "/a.safetensors"
    st.save(path, { ["model.norm.weight"] = tensor { 1, 2 } })
    local file = st.open(path)
    local function message(f, ...)
      local ok, e = pcall(f, ...)
      assert.is_false(ok)
      return tostring(e)
    end
    assert.truthy(message(file.read, file, "model.norm.wieght"):find('did you mean "model.norm.weight"', 1, true))
    assert.truthy(message(file.read, file, "model.norm.weight", { into = tensor.zeros { 3 } }):find "shape")
    assert.truthy(message(file.read, file, "model.norm.weight", { dtpye = "f32" }):find('did you mean "dtype"', 1,
      true))
    assert.truthy(message(st.open, dir .. "/absent.safetensors"):find "No such file")
    fs.write(dir .. "/pytorch_model.bin", "x")
    assert.truthy(message(st.open, dir .. "/pytorch_model.bin"):find "pickle")
    assert.truthy(message(st.save, path, { x = 1 }):find "tensor")
    assert.truthy(message(st.save, path, { x = tensor { 1 } }, { dtype = "i32" }):find "dtype")
    fs.write(path, "damaged")
    assert.truthy(message(file.read, file, "model.norm.weight"):find "changed")
    assert.truthy(message(st.open, path):find "bytes")
  end)

  it("reads the reference models to the last bit", function()
    local shared = helper.shared()
    if not shared then return pending "shared fixtures are absent" end
    local json = require "halo.json"
    local n = 0
    for _, name in ipairs(fs.list(shared .. "/fixtures")) do
      local folder = shared .. "/fixtures/" .. name
      if fs.is_file(folder .. "/model.safetensors") then
        for _, part in ipairs { "model", "golden" } do
          local path = folder .. "/" .. part .. ".safetensors"
          local file, raw = st.open(path), fs.read(path)
          -- The plain reading of the format, independent of the engine.
          local length = 0
          for i = 8, 1, -1 do length = length * 256 + raw:byte(i) end
          local header = json.decode(raw:sub(9, 8 + length))
          header.__metadata__ = nil
          for key, entry in pairs(header) do
            local info = file:info(key)
            local t = file:read(key)
            local from, to = entry.data_offsets[1], entry.data_offsets[2]
            assert.same(#entry.shape, t.ndim)
            assert.equal(entry.dtype, info.code)
            local ffi = require "ffi"
            local C = require("halo.ffi").C
            assert.equal(to - from, info.bytes)
            local bytes = ffi.string(C.halo_tensor_data(t), to - from)
            assert.is_true(bytes == raw:sub(9 + length + from, 8 + length + to))
            n = n + 1
          end
          file:close()
        end
      end
    end
    assert.is_true(n > 100)
  end)
end)
