/* How fast threads read memory: read_speed BYTES THREADS HUGE [FILE]

   Allocates and fills BYTES, or maps the first BYTES of FILE, in huge pages if HUGE is 1 and the
   system gives them. Then, for each line of its input, prints the bytes per second of the fastest of
   a few readings of all of it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PASSES = 3, MOST_THREADS = 1024, ALIGNMENT = 2 << 20 };

struct part {
  const uint64_t *words;
  size_t count;
  uint64_t result;
};

static void *read_part(void *argument) {
  struct part *part = argument;
  uint64_t all = 0;
  for (size_t i = 0; i < part->count; i++) all |= part->words[i];
  part->result = all;
  return NULL;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void *allocated(size_t bytes) {
  void *memory;
  return posix_memalign(&memory, ALIGNMENT, bytes) ? NULL : memory;
}

static void *mapped(const char *file, size_t bytes) {
  void *memory = mmap(NULL, bytes, PROT_READ, MAP_SHARED, open(file, O_RDONLY), 0);
  return memory == MAP_FAILED ? NULL : memory;
}

int main(int count, char **arguments) {
  if (count != 4 && count != 5) return 2;
  const size_t bytes = strtoull(arguments[1], NULL, 10);
  const int threads = atoi(arguments[2]);
  if (threads < 1 || threads > MOST_THREADS) return 2;
  void *memory = count == 5 ? mapped(arguments[4], bytes) : allocated(bytes);
  if (!memory) return 1;
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, atoi(arguments[3]) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  if (count == 4) memset(memory, 1, bytes);

  static struct part parts[MOST_THREADS];
  static pthread_t handles[MOST_THREADS];
  const size_t words = bytes / sizeof(uint64_t) / threads;
  for (char line[16]; fgets(line, sizeof line, stdin);) {
    double best = 1e30;
    for (int pass = 0; pass < PASSES; pass++) {
      const double start = now();
      for (int i = 0; i < threads; i++) {
        parts[i] = (struct part){(const uint64_t *)memory + i * words, words, 0};
        if (pthread_create(&handles[i], NULL, read_part, &parts[i])) return 1;
      }
      for (int i = 0; i < threads; i++) pthread_join(handles[i], NULL);
      const double took = now() - start;
      best = took < best ? took : best;
    }
    printf("%.0f\n", (double)(words * threads * sizeof(uint64_t)) / best);
    fflush(stdout);
  }
  return 0;
}
