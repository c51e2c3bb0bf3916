std = "luajit+busted"
max_line_length = 120
exclude_files = { "build*", "runs" }
files["recipes/*.lua"] = { std = "luajit", ignore = { "113" } }
