std = "luajit+busted"
max_line_length = 120
exclude_files = { "build*", "runs" }
-- A recipe's words are its globals; halo itself refuses those that do not exist.
files["recipes/**/*.lua"] = { ignore = { "113" } }
files["tests/fixtures/**/*.lua"] = { ignore = { "113" } }
