# Named steps of the protocol, for tests that end or stop a process right behind one of them.
#
# Nothing is compiled of it unless the build sets SHMCOORD_STEPS=1. Then a process whose environment
# has SHMCOORD_KILL_AT=<step> (or SHMCOORD_STOP_AT) at that moment sends itself SIGKILL (SIGSTOP)
# behind the first such step. The names are those of the model in tests/proofs.
cdef extern from *:
    """
    #ifdef SHMCOORD_STEPS
    #include <signal.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>
    static void shmc_step(const char *name) {
        const char *at = getenv("SHMCOORD_KILL_AT");
        if (at && strcmp(at, name) == 0) {
            kill(getpid(), SIGKILL);
            for (;;)
                pause(); /* the signal is on its way to all threads */
        }
        at = getenv("SHMCOORD_STOP_AT");
        if (at && strcmp(at, name) == 0) {
            unsetenv("SHMCOORD_STOP_AT");
            kill(getpid(), SIGSTOP);
        }
    }
    #else
    #define shmc_step(name) ((void)(name))
    #endif
    """
    void step "shmc_step" (const char* name) noexcept nogil
