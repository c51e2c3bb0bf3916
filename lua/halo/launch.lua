--- Ranks: which one are we, and starting the others.
--
-- A recipe says how many ranks it wants (`mesh`). When no launcher started us, `halo` re-executes itself
-- under Open MPI's mpirun on this machine; when one did (mpirun, srun), its number of ranks must be the
-- one the recipe wants. Environment variables are read before MPI starts, so that `halo --help` inside a
-- job costs nothing; halo_comm_world compares them with what MPI says.
local errors = require "halo.errors"
local process = require "halo.process"
local term = require "halo.term"

local M = {}

-- Launchers and the variables that say (ranks, rank): Open MPI, MPICH and Intel MPI, Slurm's srun.
local launchers = {
  { "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK" },
  { "PMI_SIZE", "PMI_RANK" },
  { "SLURM_STEP_NUM_TASKS", "SLURM_PROCID" },
}

--- Ranks of the job and our number in it, as the launcher says.
-- @treturn int ranks; 1 when no launcher started us
-- @treturn int rank, from 0
-- @treturn boolean true when a launcher started us
function M.job()
  for _, names in ipairs(launchers) do
    local size = tonumber(os.getenv(names[1]))
    if size then return size, tonumber(os.getenv(names[2])) or 0, true end
  end
  return 1, 0, false
end

--- True where output for people belongs: on one rank, or on rank 0.
function M.is_first()
  local _, rank = M.job()
  return rank == 0
end

local world

--- The C handle of the whole job's communicator, made once and ended by `close`: MPI when a launcher started
-- several ranks, else `self`. `halo.comm.world()` is the object for it.
function M.world()
  if world == nil then
    local halo_ffi = require "halo.ffi"
    local out = halo_ffi.ffi.new "halo_comm *[1]"
    local make = M.job() > 1 and halo_ffi.C.halo_comm_world or halo_ffi.C.halo_comm_self
    halo_ffi.check(make(out))
    world = out[0]
  end
  return world
end

--- End of the program: give the world back and finalise MPI. Harmless when neither was used.
function M.close()
  if world == nil then return end
  local C = require("halo.ffi").C
  collectgarbage() -- rings that were made on it go first
  C.halo_comm_free(world)
  world = nil
  C.halo_comm_shutdown()
end

--- After an error that other ranks do not know of: end the whole job with this exit code.
function M.abort(code)
  if world ~= nil then require("halo.ffi").C.halo_comm_abort(world, code) end
end

--- Command that starts `argv` on n ranks of this machine.
-- Open MPI's second between SIGTERM and SIGKILL stays as it is: when a rank dies the others wait for it in
-- a collective, deaf to SIGTERM, and must go. Requests to save reach ranks as SIGUSR1 (lua/host.c).
-- @tparam int n ranks
-- @tparam table argv the program and its words
-- @tparam[opt] boolean no_input mpirun leaves standard input alone
function M.command(n, argv, no_input)
  local words = { "mpirun", "-n", tostring(n), "--oversubscribe", "--bind-to", "none", "--quiet" }
  if no_input then words[#words + 1], words[#words + 2] = "--stdin", "none" end
  if process.is_root() then words[#words + 1] = "--allow-run-as-root" end
  for _, word in ipairs(argv) do words[#words + 1] = word end
  return words
end

--- Make sure that as many ranks run as are wanted: returns nil when they do, starts the program again under
-- mpirun when it was started alone.
-- @tparam int wanted ranks
-- @tparam table argv the command line to start again, program first
-- @tparam[opt] table o `origin` (what asks for the ranks, for the message), `no_input`,
-- `supervise` (stay beside the ranks, pass signals on as requests to save, and return their exit code;
-- otherwise this process becomes mpirun)
-- @treturn ?int exit code of the ranks, when they were supervised
function M.ensure(wanted, argv, o)
  o = o or {}
  local size, _, launched = M.job()
  if launched then
    if size ~= wanted then
      errors.raise("usage", ("%s wants %d rank%s, this job has %d; try mesh.cp=%d"):format(o.origin or "the mesh",
        wanted, wanted == 1 and "" or "s", size, size), 0)
    end
    return
  end
  if wanted == 1 then return end
  if not process.which "mpirun" then
    errors.raise("environment", ("%d ranks need mpirun, which is not installed (package openmpi-bin; "
      .. "tools/install-deps installs it)"):format(wanted), 0)
  end
  -- Ranks share the cores; without this each would start a thread per core.
  if not os.getenv "OMP_NUM_THREADS" then
    process.setenv("OMP_NUM_THREADS", math.max(1, math.floor(process.cores() / wanted)))
  end
  for name, value in pairs(term.environment()) do process.setenv(name, value) end
  local command = M.command(wanted, argv, o.no_input)
  local host = rawget(_G, "halo_host")
  if o.supervise and host then return host.supervise(command) end
  process.exec(command)
end

return M
