--- Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): bias on q, k and v.
return {
  name = "qwen2",
  architecture = "Qwen2ForCausalLM",
  qkv_bias = true,
  qk_norm = false,
  defaults = { rope_theta = 1e6, eps = 1e-6, tie = true },
}
