--- `halo run RECIPE`: train.
local cli = require "halo.cli"
local launch = require "halo.launch"

local M = {
  name = "run",
  summary = "Train what a recipe says.",
  example = "halo run recipes/tiny.lua stages.1.steps=50 --out runs",
}

function M.define(command)
  command:argument("recipe", "a recipe file, or the name of one in recipes/")
  command:argument("overrides", "changes to it, as optim.lr=1e-4 or stages.2.tokens=2e9"):args "*"
  command:option("--ranks -n", "processes to train on; sets mesh.cp (default: what the recipe's mesh says)")
    :convert(cli.count):argname "N"
  command:option("--resume", "auto: go on from the newest checkpoint of this recipe, if there is one; "
    .. "or a run or checkpoint folder"):argname "DIR"
  command:option("--out", "the run's folder (default: a new one, named by date and recipe, in the recipe's out)")
    :argname "DIR"
  command:flag("--verbose -v", "say more")
end

function M.run(options)
  local resolved = cli.read_recipe(options)
  local mesh = resolved.mesh
  local ended = launch.ensure(mesh.dp * mesh.cp, options.argv,
    { origin = ("mesh { dp = %d, cp = %d }"):format(mesh.dp, mesh.cp), supervise = true, no_input = true })
  if ended then return ended end
  local _, code = require("halo.train").run(resolved, {
    resume = options.resume, out = options.out, verbose = options.verbose or false,
  })
  return code
end

return M
