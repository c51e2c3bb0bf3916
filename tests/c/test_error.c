#include "check.h"

static void names_are_known(void) {
  CHECK(strcmp(halo_status_name(HALO_OK), "HALO_OK") == 0);
  CHECK(strcmp(halo_status_name(HALO_EINTERRUPTED), "HALO_EINTERRUPTED") == 0);
  CHECK(strcmp(halo_status_name(1), "HALO_E?") == 0);
}

int main(void) {
  RUN(names_are_known);
  return check_report();
}
