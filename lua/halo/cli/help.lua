--- `halo help [WORD]`: recipe words, exit codes, functions.
local M = {
  name = "help",
  summary = "Explain a recipe word, a function or an exit code.",
  example = "halo help stage",
}

function M.define(command)
  command:argument("word", "a recipe word (stage), a group of words (rope), a function (tensor.zeros), an op "
    .. "(matmul), or a topic (recipe, exit-codes)"):args "?"
end

function M.run(options)
  local help = require "halo.help"
  if not options.word then
    print(help.overview())
    return
  end
  local text, why = help.find(options.word)
  if not text then require("halo.errors").raise("usage", why, 0) end
  print(text)
end

return M
