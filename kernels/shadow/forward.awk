# forward.awk: from kernels.def to the CUDA twins of a shadow build. Per row:
#
#   halo_status halo_cuda_rope ARGUMENTS {
#     device pointers must lie in the arena, host arrays outside of it;
#     open the arena, call halo_cpu_rope, close it, keep an error of bad input for later
#   }
#
# Which pointers are host memory is a matter of names and types, as kernels.def says: small arrays (shape,
# stride), structs, marks, and what memory.c handles itself, which is left out here.
BEGIN {
  split("memory_new memory_free memory_trim copy_in copy_out copy zero synchronize " \
        "device_count device_read device_select", own, " ")
  for (i in own) by_hand[own[i]] = 1
  print "/* Made by forward.awk from kernels.def. */"
  print "#include \"shadow/shadow.h\"\n"
}

function trim(s) { sub(/^ +/, "", s); sub(/ +$/, "", s); return s }

/^HALO_KERNEL\(/ {
  line = $0
  sub(/^HALO_KERNEL\(/, "", line)
  name = line; sub(/,.*/, "", name)
  if (name in by_hand || name ~ /^(pinned|offload)_/) next
  args = line; sub(/^[^,]*, *\(/, "", args); sub(/\)\) *$/, "", args)
  n = split(args, part, ",")
  checks = ""; call = ""
  for (i = 1; i <= n; i++) {
    a = trim(part[i])
    id = a; sub(/.*[ *]/, "", id)
    type = substr(a, 1, length(a) - length(id))
    gsub(/const /, "", type); gsub(/ /, "", type)
    call = call (i > 1 ? ", " : "") id
    if (type !~ /\*$/ || name ~ /^mark/) continue # marks are host memory on the host's clock
    if (name ~ /^mark/) continue
    if (type ~ /^halo_/) {
      sub(/\*$/, "", type)
      checks = checks "  HALO_TRY(halo__shadow_" type "(\"" name "\", " id "));\n"
    } else if (id ~ /shape|stride/ || (name == "sum_squares" && id == "out")) {
      checks = checks "  HALO_TRY(halo__shadow_host(\"" name "\", \"" id "\", " id "));\n"
    } else {
      checks = checks "  HALO_TRY(halo__shadow_device(\"" name "\", \"" id "\", " id "));\n"
    }
  }
  print "halo_status halo_cuda_" name "(" args ") {"
  printf "%s", checks
  print "  halo__shadow_open();"
  print "  const halo_status status = halo_cpu_" name "(" call ");"
  print "  halo__shadow_close();"
  print "  return halo__shadow_done(\"" name "\", status);"
  print "}\n"
}
