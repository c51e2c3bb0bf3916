/* error.c: status names and the thread-local message.
 *
 * Every failing path writes one message into a fixed thread-local buffer, so reporting a failure
 * never allocates: an out-of-memory error can always be told. The message is built by HALO_CHECK and
 * friends (internal.h) in the function that knows the argument's name; callers only pass the status
 * on. halo__error_prefix lets an outer layer add where it happened (rank, layer, file).
 */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { HALO__MESSAGE_BYTES = 1024 };

static _Thread_local char message[HALO__MESSAGE_BYTES];

const char *halo_error_message(void) { return message; }

const char *halo_status_name(int32_t status) {
  switch (status) {
  case HALO_OK: return "HALO_OK";
  case HALO_EARG: return "HALO_EARG";
  case HALO_ENOMEM: return "HALO_ENOMEM";
  case HALO_EIO: return "HALO_EIO";
  case HALO_ECORRUPT: return "HALO_ECORRUPT";
  case HALO_EVERSION: return "HALO_EVERSION";
  case HALO_ECUDA: return "HALO_ECUDA";
  case HALO_ECOMM: return "HALO_ECOMM";
  case HALO_ESTATE: return "HALO_ESTATE";
  case HALO_EUNSUPPORTED: return "HALO_EUNSUPPORTED";
  case HALO_ENUMERIC: return "HALO_ENUMERIC";
  case HALO_EINTERRUPTED: return "HALO_EINTERRUPTED";
  default: return "HALO_E?";
  }
}

int32_t halo_version(void) { return HALO__VERSION; }

halo_status halo__error(halo_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  return status;
}

halo_status halo__error_prefix(halo_status status, const char *format, ...) {
  char inner[HALO__MESSAGE_BYTES];
  memcpy(inner, message, sizeof inner);
  va_list args;
  va_start(args, format);
  int n = vsnprintf(message, sizeof message, format, args);
  va_end(args);
  if (n >= 0 && (size_t)n < sizeof message) {
    snprintf(message + n, sizeof message - (size_t)n, "%s", inner);
  }
  return status;
}
