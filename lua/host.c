/* host.c: the `halo` program, a small host around LuaJIT.
 *
 * It finds the Lua tree (beside the sources it was built from, or HALO_LUA), puts it on package.path,
 * passes argv and runs halo.cli. Everything a user sees is decided in Lua.
 */
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  lua_State *L = luaL_newstate();
  if (L == NULL) {
    fprintf(stderr, "halo: cannot create a Lua state\n");
    return 70;
  }
  luaL_openlibs(L);
  const char *root = getenv("HALO_LUA");
  lua_getglobal(L, "package");
  lua_getfield(L, -1, "path");
  lua_pushfstring(L, "%s/?.lua;%s/?/init.lua;%s", root ? root : HALO_SOURCE_DIR "/lua",
                  root ? root : HALO_SOURCE_DIR "/lua", lua_tostring(L, -1));
  lua_setfield(L, -3, "path");
  lua_settop(L, 0);
  lua_createtable(L, argc, 0);
  for (int i = 0; i < argc; i++) {
    lua_pushstring(L, argv[i]);
    lua_rawseti(L, -2, i);
  }
  lua_setglobal(L, "arg");
  int status = luaL_dostring(L, "return require('halo.cli').main(arg)");
  int code = 70;
  if (status != 0) {
    fprintf(stderr, "halo: %s\n", lua_tostring(L, -1));
  } else {
    code = (int)lua_tointeger(L, -1);
  }
  lua_close(L);
  return code;
}
