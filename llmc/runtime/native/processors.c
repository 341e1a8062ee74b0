// How many threads the process may keep busy: its affinity mask, cut to its cgroup's CPU quota (v2 and v1).
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <string.h>

int allowed_threads(void);

static long quota_of(const char *folder, const char *group) {
  char path[4096];
  long quota = -1, period = -1;
  snprintf(path, sizeof path, "%s%s/cpu.max", folder, group);
  FILE *file = fopen(path, "re");
  if (file) {
    char text[64] = "";
    if (fscanf(file, "%63s %ld", text, &period) == 2 && strcmp(text, "max") != 0) sscanf(text, "%ld", &quota);
    fclose(file);
  } else {
    snprintf(path, sizeof path, "%s%s/cpu.cfs_quota_us", folder, group);
    if ((file = fopen(path, "re"))) {
      if (fscanf(file, "%ld", &quota) != 1) quota = -1;
      fclose(file);
    }
    snprintf(path, sizeof path, "%s%s/cpu.cfs_period_us", folder, group);
    if ((file = fopen(path, "re"))) {
      if (fscanf(file, "%ld", &period) != 1) period = -1;
      fclose(file);
    }
  }
  return quota > 0 && period > 0 ? (quota + period - 1) / period : -1;
}

// The tightest quota of the process's group and those above it; -1 when there is none.
static long quota(void) {
  long least = -1;
  FILE *file = fopen("/proc/self/cgroup", "re");
  if (!file) return least;
  char line[2048];
  while (fgets(line, sizeof line, file)) {
    char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!group) continue;
    *controllers++ = *group++ = 0;
    controllers[strcspn(controllers, ":")] = 0;
    group[strcspn(group, "\n")] = 0;
    const char *folder = *controllers == 0 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    if (*controllers && !strstr(controllers, "cpu")) continue;
    for (;;) {
      long here = quota_of(folder, group);
      if (here > 0 && (least < 0 || here < least)) least = here;
      char *slash = strrchr(group, '/');
      if (!slash || !*group) break;
      *slash = 0;
    }
  }
  fclose(file);
  return least;
}

int allowed_threads(void) {
  cpu_set_t set;
  long count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  long limit = quota();
  if (limit > 0 && limit < count) count = limit;
  return count > 0 ? (int)count : 1;
}
