--- Llama 3 (arXiv 2407.21783): no bias.
return {
  name = "llama",
  architecture = "LlamaForCausalLM",
  qkv_bias = false,
  qk_norm = false,
  defaults = { rope_theta = 5e5, eps = 1e-5, tie = false },
}
