/* Runs one kernel under an emulator: harness TASKS D0 D1 D2 D3 FILE..., each file an argument, read and written back. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void *P;
extern void kernel(int32_t, int32_t, const int32_t *, P, P, P, P, P, P, P, P);

int main(int count, char **words) {
  int tasks = atoi(words[1]), files = count - 6;
  int32_t dims[4];
  P a[8] = {0};
  long sizes[8];
  for (int i = 0; i < 4; i++) dims[i] = atoi(words[2 + i]);
  for (int i = 0; i < files; i++) {
    FILE *file = fopen(words[6 + i], "rb");
    fseek(file, 0, SEEK_END);
    sizes[i] = ftell(file);
    rewind(file);
    a[i] = aligned_alloc(64, (size_t)(sizes[i] + 63) / 64 * 64);
    if (fread(a[i], 1, (size_t)sizes[i], file) != (size_t)sizes[i]) return 1;
    fclose(file);
  }
  for (int t = 0; t < tasks; t++) kernel(t, tasks, dims, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
  for (int i = 0; i < files; i++) {
    FILE *file = fopen(words[6 + i], "wb");
    fwrite(a[i], 1, (size_t)sizes[i], file);
    fclose(file);
  }
  return 0;
}
