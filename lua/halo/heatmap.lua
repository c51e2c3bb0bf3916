--- Needle maps for the terminal and as SVG: depth from top to bottom, length from left to right.
--
-- Colours are the three stops of the well-known needle plots with the range fixed to 0..1, so that an
-- all-green map means all right and not "all alike". The number is printed too, so the map reads the same
-- without colour.
local svg = require "halo.svg"
local term = require "halo.term"

local M = {}

-- Grid of a needle result: sorted lengths and depths, values[depth index][length index].
local function grid(result)
  local lengths, depths, seen = {}, {}, { l = {}, d = {} }
  for _, cell in ipairs(result.cells) do
    if not seen.l[cell.length] then
      seen.l[cell.length] = true
      lengths[#lengths + 1] = cell.length
    end
    if not seen.d[cell.depth] then
      seen.d[cell.depth] = true
      depths[#depths + 1] = cell.depth
    end
  end
  table.sort(lengths)
  table.sort(depths)
  local values = {}
  for r, d in ipairs(depths) do
    values[r] = {}
    for c, l in ipairs(lengths) do
      for _, cell in ipairs(result.cells) do
        if cell.length == l and cell.depth == d then values[r][c] = cell.score end
      end
    end
  end
  return lengths, depths, values
end

--- The map as text; coloured when `fd` (default 1) is a terminal.
function M.text(result, title, fd)
  local lengths, depths, values = grid(result)
  local lines = { title or "needle score, depth x length" }
  for r, d in ipairs(depths) do
    local cells = {}
    for c = 1, #lengths do
      local v = values[r][c]
      local label = v and (" %4.0f%% "):format(100 * v) or "   -   "
      if v and term.has_color(fd or 1) then
        local rgb = svg.color(v, svg.needle_stops)
        label = ("\27[48;2;%d;%d;%dm\27[38;2;20;20;20m%s\27[0m"):format(rgb[1], rgb[2], rgb[3], label)
      end
      cells[c] = label
    end
    lines[#lines + 1] = ("%5.0f%% %s"):format(d, table.concat(cells))
  end
  local foot = {}
  for c, l in ipairs(lengths) do foot[c] = ("%6s "):format(term.context(l)) end
  lines[#lines + 1] = "depth  " .. table.concat(foot) .. " tokens"
  return table.concat(lines, "\n")
end

--- Several maps side by side (before, after).
function M.beside(blocks, gap)
  local columns, height = {}, 0
  for i, block in ipairs(blocks) do
    columns[i] = {}
    for l in (block .. "\n"):gmatch "(.-)\n" do table.insert(columns[i], l) end
    height = math.max(height, #columns[i])
  end
  local widths = {}
  for i, list in ipairs(columns) do
    widths[i] = 0
    for _, l in ipairs(list) do widths[i] = math.max(widths[i], term.length(l)) end
  end
  local lines = {}
  for r = 1, height do
    local parts = {}
    for i, list in ipairs(columns) do parts[i] = term.pad(list[r] or "", widths[i]) end
    lines[r] = (table.concat(parts, (" "):rep(gap or 6)):gsub("%s+$", ""))
  end
  return table.concat(lines, "\n")
end

--- The map as SVG.
function M.svg(result, title)
  local lengths, depths, values = grid(result)
  local columns, rows = {}, {}
  for c, l in ipairs(lengths) do columns[c] = term.context(l) end
  for r, d in ipairs(depths) do rows[r] = ("%.0f%%"):format(d) end
  return svg.heatmap { title = title or "Needle score", x_label = "context, tokens", y_label = "depth",
    columns = columns, rows = rows, values = values }
end

return M
