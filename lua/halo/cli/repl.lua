--- `halo repl [RECIPE]`: the prompt.
local cli = require "halo.cli"
local fs = require "halo.fs"
local launch = require "halo.launch"
local process = require "halo.process"
local term = require "halo.term"

local M = {
  name = "repl",
  summary = "Try things at a prompt, alone or on several ranks.",
  example = "halo repl recipes/tiny.lua",
}

function M.define(command)
  command:argument("recipe", "a recipe (in R then), a run's folder, a checkpoint, or a model folder"):args "?"
  command:argument("overrides", "changes to it, as mesh.cp=2"):args "*"
  command:option("--ranks -n", "run every line on N processes"):convert(cli.count):argname "N"
end

function M.run(options)
  local _, rank, launched = launch.job()
  if options.ranks then
    -- mpirun gives ranks pipes for a terminal: rank 0 takes the terminal itself, mpirun must not read it.
    local at_terminal = term.is_tty(0) and term.is_tty(1)
    if at_terminal then process.setenv("HALO_REPL_TTY", 1) end
    launch.ensure(options.ranks, options.argv, { origin = "--ranks", no_input = at_terminal })
  end
  if launched then
    if rank > 0 then
      process.redirect(1, "/dev/null") -- every rank prints, one is heard
    elseif os.getenv "HALO_REPL_TTY" then
      if process.take_terminal() then process.setenv("HALO_TTY", "012") end
    end
  end
  if not options.recipe then return require("halo.repl").run() end
  if fs.is_dir(options.recipe) then return require("halo.repl").run { target = options.recipe } end
  local _, node = cli.read_recipe(options)
  return require("halo.repl").run { recipe = node }
end

return M
