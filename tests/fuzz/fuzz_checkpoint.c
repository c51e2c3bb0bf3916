/* Manifests of checkpoints, behind the seal (which the fuzzer could not guess): names stay inside the
 * folder, hashes have the right number, and what is accepted is the same after writing and reading. */
#include "checkpoint.h"
#include "fuzz.h"

#define HASH "\"sha256\":\"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\""

static void seeds(void) {
  static const char *const bodies[] = {
      "{\"format\":\"halo-checkpoint\",\"version\":1,\"step\":400,\"world\":2,\"files\":[],\"state\":{},\"manifest_sha256\":\"\"}",
      "{\"format\":\"halo-checkpoint\",\"version\":1,\"step\":0,\"world\":1,\"files\":[{\"name\":\"a.json\",\"bytes\":3," HASH
      ",\"chunks\":\"0123456789abcdef\"},{\"name\":\"optim/b\",\"bytes\":0," HASH ",\"chunks\":\"\"}],"
      "\"state\":{\"x\":[1.5,null,true],\"y\":\"\\u00e9\"},\"manifest_sha256\":\"\"}",
      "{\"format\":\"halo-checkpoint\",\"version\":2}"};
  for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) put_seed_text(0, bodies[i]);
  put_seed_text(1, "{\n  \"manifest_sha256\": \"00\"\n}\n");
  static const char dictionary[] =
      "\"\\\"format\\\":\\\"halo-checkpoint\\\"\"\n\"\\\"version\\\":\"\n\"\\\"step\\\":\"\n\"\\\"world\\\":\"\n"
      "\"\\\"files\\\":[\"\n\"\\\"state\\\":\"\n\"\\\"name\\\":\"\n\"\\\"bytes\\\":\"\n\"\\\"sha256\\\":\"\n\"\\\"chunks\\\":\"\n"
      "\"optim/\"\n\"../\"\n\"4194305\"\n\"9223372036854775807\"\n\"  \\\"manifest_sha256\\\": \\\"\"\n";
  put_named("dictionary", dictionary, sizeof dictionary - 1);
}

static void write_and_read(const halo__manifest *m) {
  halo__text text = {0};
  halo__manifest again;
  MUST(halo__manifest_write(&text, m) == HALO_OK);
  MUST(halo__manifest_parse(&again, "again", text.text, (int64_t)text.n) == HALO_OK);
  MUST(again.step == m->step && again.world == m->world && again.n == m->n);
  MUST((again.state == NULL) == (m->state == NULL) && (m->state == NULL || strcmp(again.state, m->state) == 0));
  for (int32_t i = 0; i < m->n; i++) {
    const halo__digest *a = &again.file[i].digest, *b = &m->file[i].digest;
    MUST(strcmp(again.file[i].name, m->file[i].name) == 0 && a->bytes == b->bytes && a->n_chunks == b->n_chunks);
    MUST(strcmp(a->sha256, b->sha256) == 0 && memcmp(a->chunks, b->chunks, (size_t)a->n_chunks * 8) == 0);
  }
  halo__manifest_free(&again);
  halo__text_free(&text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  const size_t n = size - 1;
  halo__manifest m;
  char *text = malloc(n > 0 ? n : 1);
  memcpy(text, data + 1, n);
  const halo_status status = data[0] % 2 == 0 ? halo__manifest_parse_unsealed(&m, "input", text, (int64_t)n)
                                              : halo__manifest_parse(&m, "input", text, (int64_t)n);
  MUST(status == HALO_OK || status == HALO_ECORRUPT || status == HALO_EVERSION);
  free(text);
  if (status != HALO_OK) return 0;
  MUST(m.step >= 0 && m.world >= 1);
  for (int32_t i = 0; i < m.n; i++) {
    const char *name = m.file[i].name;
    MUST(name[0] != '/' && name[0] != '.' && strstr(name, "/.") == NULL && strlen(name) <= 511);
    MUST(m.file[i].digest.bytes >= 0 && (m.file[i].digest.bytes + HALO__CHUNK - 1) / HALO__CHUNK == m.file[i].digest.n_chunks);
  }
  write_and_read(&m);
  halo__manifest_free(&m);
  return 0;
}
