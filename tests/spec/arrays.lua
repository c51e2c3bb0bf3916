--- Plain Lua arrays for reference results: `{ shape = { 2, 3 }, [1] = ..., [6] = ... }`, row-major.
-- Written to be obviously right, not fast; nothing here uses the engine.
local M = {}

--- Number of elements of a shape.
function M.count(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

--- A new array; `at(position)` gives the element at 1-based positions.
function M.build(shape, at)
  local y, n = { shape = shape }, M.count(shape)
  local position = {}
  for d = 1, #shape do position[d] = 1 end
  for i = 1, n do
    y[i] = at(position, i)
    for d = #shape, 1, -1 do
      position[d] = position[d] + 1
      if position[d] <= shape[d] then break end
      position[d] = 1
    end
  end
  return y
end

--- Element of x at 1-based positions.
function M.at(x, position)
  local flat = 0
  for d = 1, #x.shape do flat = flat * x.shape[d] + position[d] - 1 end
  return x[flat + 1]
end

--- A copy of a list with one entry replaced (value nil: removed).
function M.with(list, index, value)
  local copy = {}
  for i, v in ipairs(list) do
    if i ~= index then
      copy[#copy + 1] = v
    elseif value ~= nil then
      copy[#copy + 1] = value
    end
  end
  return copy
end

--- A copy of a list with a value put in before an index.
function M.inserted(list, index, value)
  local copy = {}
  for i = 1, #list + 1 do
    if i == index then copy[#copy + 1] = value end
    copy[#copy + 1] = list[i]
  end
  return copy
end

--- Element by element.
function M.map(x, f)
  return M.build(x.shape, function(_, i) return f(x[i]) end)
end

--- Shape that several arrays broadcast to.
function M.broadcast_shape(...)
  local ndim, shape = 0, {}
  for _, x in ipairs { ... } do ndim = math.max(ndim, #x.shape) end
  for d = 1, ndim do
    shape[d] = 1
    for _, x in ipairs { ... } do
      local size = x.shape[d - (ndim - #x.shape)] or 1
      if size ~= 1 then shape[d] = size end
    end
  end
  return shape
end

--- Element of x at the positions of a shape it broadcasts to.
function M.repeated_at(x, position)
  local own, shift = {}, #position - #x.shape
  for d = 1, #x.shape do own[d] = x.shape[d] == 1 and 1 or position[d + shift] end
  return M.at(x, own)
end

--- f of all arrays, element by element, with broadcasting.
function M.zip(f, ...)
  local list = { ... }
  return M.build(M.broadcast_shape(...), function(position)
    local values = {}
    for i, x in ipairs(list) do values[i] = M.repeated_at(x, position) end
    return f(unpack(values))
  end)
end

--- A dim from 1, or negative from the end, as a dim from 1.
function M.dim(x, dim) return dim < 0 and dim + #x.shape + 1 or dim end

--- The run along a dim through a position, as a list.
function M.fibre(x, dim, position)
  local run = {}
  for j = 1, x.shape[dim] do run[j] = M.at(x, M.with(position, dim, j)) end
  return run
end

--- Reduce: f(run) gives one value. Without a dim all elements are one run.
function M.reduce(x, dim, keepdim, f)
  if not dim then
    local run = {}
    for i = 1, M.count(x.shape) do run[i] = x[i] end
    local shape = {}
    if keepdim then
      for d = 1, #x.shape do shape[d] = 1 end
    end
    return M.build(shape, function() return f(run) end)
  end
  dim = M.dim(x, dim)
  return M.build(M.with(x.shape, dim, keepdim and 1 or nil), function(position)
    local inside = keepdim and position or M.inserted(position, dim, 1)
    return f(M.fibre(x, dim, inside))
  end)
end

--- f(run) gives a run of the same or another length, put back along the dim.
function M.along(x, dim, f)
  dim = M.dim(x, dim)
  local runs = {}
  local function run_at(position)
    local key = table.concat(M.with(position, dim, 0), ",")
    if not runs[key] then runs[key] = f(M.fibre(x, dim, position)) end
    return runs[key]
  end
  local like = {} -- what f does to the length
  for j = 1, x.shape[dim] do like[j] = 0 end
  local length = #f(like)
  return M.build(M.with(x.shape, dim, length), function(position)
    return run_at(M.with(position, dim, 1))[position[dim]]
  end)
end

--- Matrix product with broadcast leading dims.
function M.matmul(a, b)
  local function lead(x) return { shape = { unpack(x.shape, 1, #x.shape - 2) } } end
  local batch = M.broadcast_shape(lead(a), lead(b))
  local shape = { unpack(batch) }
  local inner = a.shape[#a.shape]
  shape[#shape + 1] = a.shape[#a.shape - 1]
  shape[#shape + 1] = b.shape[#b.shape]
  local function matrix_at(x, position, row, col)
    local own, shift = {}, #batch - (#x.shape - 2)
    for d = 1, #x.shape - 2 do own[d] = x.shape[d] == 1 and 1 or position[d + shift] end
    own[#own + 1], own[#own + 2] = row, col
    return M.at(x, own)
  end
  return M.build(shape, function(position)
    local row, col, sum = position[#position - 1], position[#position], 0
    for k = 1, inner do sum = sum + matrix_at(a, position, row, k) * matrix_at(b, position, k, col) end
    return sum
  end)
end

return M
