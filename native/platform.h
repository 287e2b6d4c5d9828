/* What differs by operating system and processor: threads, aligned memory, denormals. */
#ifndef ZIGMA_PLATFORM_H
#define ZIGMA_PLATFORM_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(_WIN32)

#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <windows.h>

typedef HANDLE zs_thread;
typedef int zs_signals;
#define ZS_THREAD_FUNCTION(name, argument) static DWORD WINAPI name(void *argument)
#define ZS_THREAD_RESULT 0

/* CreateThread rather than _beginthreadex: the threads call nothing of the C library but the allocator. */
static int start_thread(zs_thread *thread, DWORD(WINAPI *run)(void *), void *argument) {
    return (*thread = CreateThread(NULL, 0, run, argument, 0, NULL)) != NULL;
}

static void join_thread(zs_thread thread) {
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}

static int64_t current_process(void) { return (int64_t)GetCurrentProcessId(); }

static void block_signals(zs_signals *before) { *before = 0; }
static void restore_signals(const zs_signals *before) { (void)before; }

static void use_huge_pages(void *memory, int64_t bytes) { (void)memory, (void)bytes; }

static void *allocate_aligned(size_t bytes) { return _aligned_malloc(bytes, 64); }
static void release_aligned(void *memory) { _aligned_free(memory); }

#else

#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

typedef pthread_t zs_thread;
typedef sigset_t zs_signals;
#define ZS_THREAD_FUNCTION(name, argument) static void *name(void *argument)
#define ZS_THREAD_RESULT NULL

static int start_thread(zs_thread *thread, void *(*run)(void *), void *argument) {
    return !pthread_create(thread, NULL, run, argument);
}

static void join_thread(zs_thread thread) { pthread_join(thread, NULL); }

static int64_t current_process(void) { return (int64_t)getpid(); }

/* Threads inherit the mask: signals belong to the host's threads. */
static void block_signals(zs_signals *before) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, before);
}
static void restore_signals(const zs_signals *before) { pthread_sigmask(SIG_SETMASK, before, NULL); }

static void use_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE); /* advice: a refusal changes nothing */
#else
    (void)memory, (void)bytes;
#endif
}

static void *allocate_aligned(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes) ? NULL : memory;
}
static void release_aligned(void *memory) { free(memory); }

#endif

/* Makes the calling thread take and give 0 for denormals; returns what `restore_denormals` needs. */
#if defined(__aarch64__)
static uint64_t flush_denormals(void) {
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" : : "r"(control | 1u << 24)); /* FZ */
    return control;
}
static void restore_denormals(uint64_t control) { __asm__ volatile("msr fpcr, %0" : : "r"(control)); }
#else
#include <xmmintrin.h>
static uint64_t flush_denormals(void) {
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040); /* FTZ, DAZ */
    return control;
}
static void restore_denormals(uint64_t control) { _mm_setcsr((unsigned)control); }
#endif

#endif
