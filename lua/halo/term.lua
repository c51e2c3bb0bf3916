--- The terminal: is it one, how wide, may we colour.
-- Colour only on a terminal, never with NO_COLOR set (no-color.org) or TERM=dumb; FORCE_COLOR=1 turns
-- it on for pipes such as `less -R`.
local ffi = require "ffi"

if not pcall(ffi.typeof, "struct halo_winsize") then
  ffi.cdef [[
  struct halo_winsize { unsigned short rows, columns, x, y; };
  int isatty(int fd);
  int ioctl(int fd, unsigned long request, ...);
  ]]
end
local C = ffi.C

local M = {}

local function set(name)
  local v = os.getenv(name)
  return v ~= nil and v ~= ""
end

--- True if a file descriptor (0 input, 1 output, 2 errors) is a terminal. Under mpirun the answer is that of
-- the process that started it (halo.launch), not of the pipes in between.
function M.is_tty(fd)
  local told = os.getenv "HALO_TTY"
  if told then return told:find(tostring(fd or 1), 1, true) ~= nil end
  return C.isatty(fd or 1) == 1
end

--- Variables that let ranks behind a launcher know our terminal: name -> value.
function M.environment()
  local fds = ""
  for fd = 0, 2 do fds = fds .. (M.is_tty(fd) and fd or "") end
  return { HALO_TTY = fds, COLUMNS = M.width(2) }
end

--- True if output on the descriptor may be coloured.
function M.has_color(fd)
  if set "NO_COLOR" then return false end
  if set "FORCE_COLOR" then return os.getenv "FORCE_COLOR" ~= "0" end
  return M.is_tty(fd) and os.getenv "TERM" ~= "dumb"
end

--- Columns of the terminal: what it says, else $COLUMNS, else 80.
function M.width(fd)
  local size = ffi.new "struct halo_winsize"
  if not os.getenv "HALO_TTY" and C.ioctl(fd or 1, 0x5413, size) == 0 and size.columns > 0 then return size.columns end
  return tonumber(os.getenv "COLUMNS") or 80
end

local codes = { bold = "1", dim = "2", red = "31", green = "32", yellow = "33", blue = "34",
  magenta = "35", cyan = "36" }

--- Text in a style ("bold", "red", ..., or "38;5;120" for code text); plain where colour is not wanted.
-- @tparam string style name or SGR parameters
-- @tparam string text
-- @tparam[opt=1] int fd where it will be written
function M.paint(style, text, fd)
  if not M.has_color(fd) then return text end
  return "\27[" .. (codes[style] or style) .. "m" .. text .. "\27[0m"
end

-- 0..1 -> red through yellow to green, in xterm's 256 colours.
local ramp = { 124, 160, 166, 172, 178, 184, 148, 112, 76, 40, 34 }

--- A cell with a background from red (0) to green (1): heat maps.
function M.heat(value, text, fd)
  if not M.has_color(fd) or value ~= value then return text end
  local i = 1 + math.floor(math.max(0, math.min(1, value)) * (#ramp - 1) + 0.5)
  return ("\27[48;5;%d;38;5;16m%s\27[0m"):format(ramp[i], text)
end

local eighths = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }

--- A line of small bars for a list of numbers, scaled from 0 (or the minimum, if negative) to the
-- maximum; `width` (default 40) values, larger lists are averaged in groups.
function M.sparkline(values, width)
  width = math.min(width or 40, #values)
  if width == 0 then return "" end
  local groups, low, high = {}, 0, -math.huge
  for g = 1, width do
    local from = math.floor((g - 1) * #values / width) + 1
    local to = math.max(from, math.floor(g * #values / width))
    local sum = 0
    for i = from, to do sum = sum + values[i] end
    local mean = sum / (to - from + 1)
    groups[g] = mean
    if mean == mean then low, high = math.min(low, mean), math.max(high, mean) end
  end
  local span = high > low and high - low or 1
  for g, v in ipairs(groups) do
    groups[g] = v == v and eighths[1 + math.floor((v - low) / span * 7 + 0.5)] or " "
  end
  return table.concat(groups)
end

--- Length in columns: UTF-8 counted by code point, colour codes not at all.
function M.length(text)
  local _, n = text:gsub("\27%[[%d;]*m", ""):gsub("[^\128-\191]", "")
  return n
end

--- Text filled with spaces to `width` columns; on the left when `width` is negative.
function M.pad(text, width)
  local fill = (" "):rep(math.max(0, math.abs(width) - M.length(text)))
  return width < 0 and fill .. text or text .. fill
end

--- Rows of cells as aligned text; the first row is the head. Numbers are right-aligned.
-- @tparam table rows list of lists of strings or numbers
-- @treturn string lines joined by newline
function M.table(rows)
  local widths, numeric = {}, {}
  for r, row in ipairs(rows) do
    for c, cell in ipairs(row) do
      widths[c] = math.max(widths[c] or 0, M.length(tostring(cell)))
      local is_number = tostring(cell):gsub("\27%[[%d;]*m", ""):match "^[%d.+%-%%eKMGx ]*$" ~= nil
      if r > 1 then numeric[c] = numeric[c] ~= false and is_number end
    end
  end
  local lines = {}
  for r, row in ipairs(rows) do
    local cells = {}
    for c, cell in ipairs(row) do
      cells[c] = M.pad(tostring(cell), numeric[c] and -widths[c] or widths[c])
    end
    lines[r] = (table.concat(cells, "  "):gsub("%s+$", ""))
  end
  return table.concat(lines, "\n")
end

local units = { { 2 ^ 40, "TiB" }, { 2 ^ 30, "GiB" }, { 2 ^ 20, "MiB" }, { 2 ^ 10, "KiB" } }

--- 1536 -> "1.5 KiB".
function M.bytes(n)
  for _, u in ipairs(units) do
    if n >= u[1] then return ("%.1f %s"):format(n / u[1], u[2]) end
  end
  return ("%d B"):format(n)
end

--- 1234567 -> "1.23M": counts of tokens, parameters and flops, decimal.
function M.count(n)
  for _, u in ipairs { { 1e18, "E" }, { 1e15, "P" }, { 1e12, "T" }, { 1e9, "B" }, { 1e6, "M" }, { 1e3, "K" } } do
    if n >= u[1] then return ("%.3g%s"):format(n / u[1], u[2]) end
  end
  return ("%.4g"):format(n)
end

--- 131072 -> "128K": context lengths, binary when it divides, else the plain number.
function M.context(n)
  if n >= 2 ^ 20 and n % 2 ^ 20 == 0 then return ("%dM"):format(n / 2 ^ 20) end
  if n >= 1024 and n % 1024 == 0 then return ("%dK"):format(n / 1024) end
  return ("%d"):format(n)
end

--- 75 -> "1m15s".
function M.duration(seconds)
  if seconds ~= seconds or seconds == math.huge then return "?" end
  if seconds < 1 then return ("%.0f ms"):format(seconds * 1000) end
  if seconds < 60 then return ("%.1fs"):format(seconds) end
  if seconds < 3600 then return ("%dm%02ds"):format(seconds / 60, seconds % 60) end
  return ("%dh%02dm"):format(seconds / 3600, seconds % 3600 / 60)
end

return M
