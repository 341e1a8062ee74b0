#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc.h"

enum { MAX_CPUS = 8192, LINE = 4096 };

/* The first line of a file into `line`; 0 when there is none. */
static int first_line(const char *path, char *line) {
  FILE *file = fopen(path, "re");
  if (file == NULL) return 0;
  int found = fgets(line, LINE, file) != NULL;
  fclose(file);
  return found;
}

static int read_number(const char *path, double *number) {
  char line[LINE];
  if (!first_line(path, line)) return 0;
  char *end;
  *number = strtod(line, &end);
  return end != line;
}

/* Processors that the group at `folder` may use, or `limit` where it has no quota of its own. */
static double quota_of(const char *folder, int version, double limit) {
  char path[LINE], line[LINE];
  double quota = -1, period = 0;
  if (version == 2) {
    snprintf(path, sizeof path, "%.3000s/cpu.max", folder);
    if (!first_line(path, line) || sscanf(line, "%lf %lf", &quota, &period) != 2) return limit; /* "max 100000" */
  } else {
    snprintf(path, sizeof path, "%.3000s/cpu.cfs_quota_us", folder);
    if (!read_number(path, &quota)) return limit;
    snprintf(path, sizeof path, "%.3000s/cpu.cfs_period_us", folder);
    if (!read_number(path, &period)) return limit;
  }
  return quota > 0 && period > 0 && quota / period < limit ? quota / period : limit;
}

/* The least quota of a group and of those it is in: each binds. */
static double quota_along(const char *mount, char *group, int version, double limit) {
  char folder[LINE];
  for (;;) {
    snprintf(folder, sizeof folder, "%.1500s%.1500s", mount, group);
    limit = quota_of(folder, version, limit);
    char *slash = strrchr(group, '/');
    if (slash == NULL) return limit;
    *slash = 0;
  }
}

/* /proc/self/cgroup has lines "0::/group" (version 2) and "4:cpu,cpuacct:/group" (version 1). Inside a container the
 * group may be named as the host sees it; then the mount's root is the container's, which the walk ends at. */
static double cgroup_quota(const char *root, double limit) {
  char path[LINE], line[LINE], mount[LINE];
  snprintf(path, sizeof path, "%.1000s/proc/self/cgroup", root);
  FILE *file = fopen(path, "re");
  if (file == NULL) return limit;
  while (fgets(line, sizeof line, file) != NULL) {
    line[strcspn(line, "\n")] = 0;
    char *controllers = strchr(line, ':');
    char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
    if (group == NULL) continue;
    *group++ = 0;
    controllers++;
    if (*controllers == 0) {
      snprintf(mount, sizeof mount, "%.1000s/sys/fs/cgroup", root);
      limit = quota_along(mount, group, 2, limit);
      continue;
    }
    char names[LINE];
    snprintf(names, sizeof names, ",%.1000s,", controllers);
    if (strstr(names, ",cpu,") == NULL) continue;
    snprintf(mount, sizeof mount, "%.1000s/sys/fs/cgroup/%.1000s", root, controllers);
    double before = limit;
    char copy[LINE];
    snprintf(copy, sizeof copy, "%s", group);
    limit = quota_along(mount, copy, 1, limit);
    if (limit == before) { /* mounted under its plain name */
      snprintf(mount, sizeof mount, "%.1000s/sys/fs/cgroup/cpu", root);
      limit = quota_along(mount, group, 1, limit);
    }
  }
  fclose(file);
  return limit;
}

/* Whether a processor shares its core with a lower one of the set; "0,64" or "0-1" names a core's processors. */
static int shares_core(const char *root, int cpu, const cpu_set_t *set, size_t size) {
  char path[LINE], line[LINE];
  snprintf(path, sizeof path, "%.1000s/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", root, cpu);
  if (!first_line(path, line)) return 0;
  for (char *at = line; *at != 0;) {
    char *end;
    long first = strtol(at, &end, 10), last = first;
    if (end == at) return 0;
    if (*end == '-') last = strtol(end + 1, &end, 10);
    for (long other = first; other <= last && other < cpu; other++)
      if (other >= 0 && CPU_ISSET_S((size_t)other, size, set)) return 1;
    at = *end == ',' ? end + 1 : end;
    if (*end != ',') break;
  }
  return 0;
}

int llmc_available_threads(const char *root) {
  union {
    cpu_set_t set;
    char room[MAX_CPUS / 8];
  } cpus;
  memset(&cpus, 0, sizeof cpus);
  int count = 0;
  if (sched_getaffinity(0, sizeof cpus, &cpus.set) == 0)
    for (int cpu = 0; cpu < MAX_CPUS; cpu++)
      if (CPU_ISSET_S((size_t)cpu, sizeof cpus, &cpus.set) && !shares_core(root, cpu, &cpus.set, sizeof cpus)) count++;
  if (count < 1) count = 1;
  /* A part of a processor does not carry a thread that others wait for: 2.5 make 2 threads. */
  int threads = (int)cgroup_quota(root, count);
  return threads < 1 ? 1 : threads;
}
