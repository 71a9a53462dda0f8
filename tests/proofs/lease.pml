/* The lease protocol: one node, two routers, anybody who sweeps or reaps; each may die at any step.
 *
 * Steps are marked with their names in the core, as in `step(b"sweep.cas")`, and functions are named
 * as there. Each atomic sequence makes one access to shared memory, so that a death, or another's
 * step, can come before any of them; what is behind a semicolon in it is local, or bookkeeping of
 * the assertions. Memory is sequentially consistent here: test_latch.py has what that leaves out.
 *
 * Dying takes three steps: the kernel marks the death word and stops the process, in either order
 * (so a process may go on for a while that others take for dead), and only then frees its owner
 * lock. A slot whose lock is free may be claimed again, with the next generation.
 *
 * A request travels with its lease's token and arrives at any later time, or never. A router that
 * has waited long enough releases; it sends the request again only if release() said that it freed
 * the lease itself, or if the node refused it.
 *
 * Asserted:
 *   CAPACITY  reservations believed in and requests running: never more than cells for use
 *   OWNER     a cell is freed by its owner, or when its owner is dead, or when its node is gone
 *   ONCE      no request is executed twice
 *   DRAINED   once a drain has seen no lease, none is believed in or adopted
 *   SWEPT     after a sweep no cell is left whose owner was dead when it began
 *   LEAKED    when all have ended and the slots are reaped, every cell is free
 *
 * Negative controls, each a -D that must violate one of them: see test_lease_model.py.
 */
#ifndef CELLS
#define CELLS 2 /* cells of the node */
#endif
#ifndef CAPACITY
#define CAPACITY CELLS /* cells that routers may use */
#endif
#ifndef ROUTERS
#define ROUTERS 2
#endif
#ifndef NODE_LIVES
#define NODE_LIVES 1 /* generations */
#endif
#ifndef ROUTER_LIVES
#define ROUTER_LIVES 1
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2 /* a router sends its request so often at most */
#endif
#ifndef KILLS
#define KILLS 1
#endif

#define TOKENS (ROUTERS * ROUTER_LIVES * ATTEMPTS)

#define NODE 0 /* slots: the node's, then the routers' */
#define SLOTS (ROUTERS + 1)

/* state:2 | owner slot:2 | owner generation:2 | op:2; 0 is free */
#define RESERVED 1
#define RUNNING 2
#define CELL(state, owner, gen, op) ((state) << 6 | (owner) << 4 | (gen) << 2 | (op))
#define STATE(cell) ((cell) >> 6)
#define OWNER(cell) (((cell) >> 4) & 3)
#define GENERATION(cell) (((cell) >> 2) & 3)

#ifdef RESERVE_IN_TWO_STEPS
#define FIRST_VALUE CELL(3, 0, 0, 0) /* taken; by whom is not known yet */
#else
#define FIRST_VALUE value
#endif

#define NOBODY 0 /* death word */
#define ALIVE 1
#define MARKED 2

#define OPEN 0 /* state of the load word */
#define DRAINING 1
#define SHUTDOWN 2

/* Shared memory. */
byte cells[CELLS];
byte generation[SLOTS];
byte death[SLOTS];
bool live[SLOTS]; /* bitmap */
byte load_state = SHUTDOWN; /* the node's load word: state and generation are one word */
byte load_generation;

/* The kernel's. */
byte lock[SLOTS]; /* owner lock: */
#define UNLOCKED 0
#define OWNED 1   /* by the slot's owner, or who is about to become it */
#define REAPING 2 /* by an observer */
bool stopped[SLOTS]; /* takes no more steps */
bool observer_stopped;

/* The network: request and token of each attempt; 0: not sent, or delivered. */
byte token[TOKENS];
byte token_cell[TOKENS];
byte token_generation[TOKENS];
#define SENT 0
#define REFUSED 1
#define DONE 2
byte reply[ROUTERS];
byte awaited[ROUTERS]; /* attempt + 1 that the router waits for; nobody hears a later reply */

/* What is only looked at by assertions. */
byte executed[ROUTERS * ROUTER_LIVES]; /* by request */
byte believed[ROUTERS];     /* the cell value a router has passed the recheck with */
byte believed_of[ROUTERS];  /* and the generation of the node */
byte running[CELLS];        /* the cell values that the node runs requests under */
byte drained;               /* generation of the node whose drain has seen no lease */
byte ended;                 /* processes that have had all their lives */

#define lives(slot) (death[slot] == ALIVE && !stopped[slot])

/* Counted over a private n and k. */
inline check_capacity() {
    n = 0;
    k = 0;
    do
    :: k < ROUTERS ->
        n = n + (believed[k] != 0 && believed_of[k] == generation[NODE] && lives(k + 1));
        k++
    :: else -> break
    od;
    k = 0;
    do
    :: k < CELLS -> n = n + (running[k] != 0); k++
    :: else -> break
    od;
    assert(!lives(NODE) || n <= CAPACITY); /* CAPACITY */
    n = 0;
    k = 0
}

/* Whether `by` may free a cell of this value (the rows of nodes that are gone apart). */
#define may_free(by, value) \
    (OWNER(value) == by || !lives(OWNER(value)) || GENERATION(value) != generation[OWNER(value)])

inline forget(value) {
    if
    :: OWNER(value) != NODE && believed[OWNER(value) - 1] == value -> believed[OWNER(value) - 1] = 0
    :: else
    fi
}

/* cas_seqcst(cell, value -> 0) */
inline free_cas(at, value, by, won) {
    if
    :: cells[at] == value ->
        assert(may_free(by, value)); /* OWNER */
        cells[at] = 0;
        forget(value);
        won = 1
    :: else -> won = 0
    fi
}

/* What the controls do instead: free whatever is there by now. */
inline free_plain(at, by) {
    assert(cells[at] == 0 || may_free(by, cells[at])); /* OWNER */
    forget(cells[at]);
    cells[at] = 0
}

/* sweep_row: anybody, any number of times. Local: i, seen, step. */
#define LOOK 0
#define GENERATION_OF 1 /* owner_is_dead, its first load */
#define DEATH_OF 2      /* its second */
#define FREE 3
inline next_cell() {
    i++;
    seen = 0;
    step = LOOK
}
inline sweep_row(by) {
    do
    :: atomic {
        i < CELLS && step == LOOK ->
        seen = cells[i];
        if
        :: seen == 0 || STATE(seen) == 3 -> next_cell()
        :: else ->
#ifdef SWEEP_NOTHING
            next_cell()
#elif defined(SWEEP_WITHOUT_DEAD_CHECK)
            step = FREE
#elif defined(SWEEP_ON_LATE_BEAT)
            if /* a heartbeat may be late at any time */
            :: step = FREE
            :: next_cell()
            fi
#else
            step = GENERATION_OF
#endif
        fi
    }
    :: atomic {
        step == GENERATION_OF ->
        if
        :: generation[OWNER(seen)] != GENERATION(seen) -> step = FREE
        :: else -> step = DEATH_OF
        fi
    }
    :: atomic {
        step == DEATH_OF ->
        if
        :: death[OWNER(seen)] != ALIVE -> step = FREE
        :: else -> next_cell()
        fi
    }
    :: atomic {
        step == FREE -> /* step sweep.cas */
#ifdef SWEEP_PLAIN_STORE
        free_plain(i, by);
#else
        free_cas(i, seen, by, won);
#endif
        won = 0;
        next_cell()
    }
    :: atomic { i == CELLS -> i = 0; break }
    od
}

/* free_owned, and for the node free_row. Local: i, seen. */
inline free_held(slot, by) {
    do
    :: atomic {
        i < CELLS && seen == 0 ->
        seen = cells[i];
        if
        :: slot == NODE && seen != 0
        :: slot != NODE && OWNER(seen) == slot && GENERATION(seen) == generation[slot]
        :: else -> seen = 0; i++
        fi
    }
    :: atomic {
        seen != 0 -> /* step sweep.cas, in give_back_cell */
        if
        :: cells[i] == seen ->
            assert(slot == NODE || may_free(by, seen));                       /* OWNER */
            assert(slot != NODE || !lives(NODE) || load_state == SHUTDOWN);   /* OWNER */
            cells[i] = 0;
            forget(seen)
        :: else
        fi;
        seen = 0;
        i++
    }
    :: atomic { i == CELLS -> i = 0; break }
    od
}

/* _clear_slot: the caller has the owner lock */
inline clear_slot(slot, by) {
    free_held(slot, by); /* step reap.owned, step reap.row */
    atomic {
        if
        :: slot == NODE -> load_state = SHUTDOWN /* _close_word: step reap.word */
        :: else
        fi
    };
    live[slot] = 0;      /* step reap.bitmap */
    death[slot] = NOBODY /* step reap.death */
}

/* claim: _take_slot, _occupy, hold */
inline claim(slot) {
    if
    :: atomic {
        life == 0 -> /* a clean slot, before anything else happens: nothing can come in between */
        lock[slot] = OWNED;
        generation[slot] = 1;
        if
        :: slot == NODE -> load_state = OPEN; load_generation = 1
        :: else
        fi;
        death[slot] = ALIVE;
        live[slot] = 1
    }
    :: atomic { life > 0 && lock[slot] == UNLOCKED -> lock[slot] = OWNED };
        clear_slot(slot, slot);                  /* step claim.slot */
        generation[slot] = generation[slot] + 1; /* step claim.generation */
        atomic {
            if
            :: slot == NODE -> load_state = OPEN; load_generation = generation[NODE]
            :: else
            fi /* step claim.load */
        };
        death[slot] = ALIVE; /* step claim.death */
        live[slot] = 1       /* step claim.bitmap */
    fi
}

/* _give_back */
inline give_back(slot) {
    free_held(slot, slot); /* step leave.owned, step leave.row */
    live[slot] = 0;        /* step leave.bitmap */
    death[slot] = NOBODY;  /* let_go: step leave.death */
    lock[slot] = UNLOCKED  /* step leave.unlock */
}

proctype Router(byte me) {
    byte i, seen, k, n;  /* scratch */
    byte at, value, gen; /* the lease */
    byte op, attempt, entry, life;
    bool won;
    do
    :: life < ROUTER_LIVES ->
        {
            claim(me);
            do
            :: atomic {
                /* pick: a private table, and a hint */
                (attempt < ATTEMPTS && death[NODE] == ALIVE && load_state == OPEN &&
                 load_generation == generation[NODE]) ->
                gen = generation[NODE];
                op++;
                value = CELL(RESERVED, me, generation[me], op)
               };
                /* take_cell (its first look is a hint, too) */
                do
#ifdef PLAIN_STORE_RESERVE
                :: at < CAPACITY && cells[at] == 0 -> atomic { cells[at] = value; break }
                :: atomic { at < CAPACITY && cells[at] != 0 -> at++ }
#else
                :: atomic {
                    at < CAPACITY -> /* step reserve.cas */
                    if
                    :: cells[at] == 0 -> cells[at] = FIRST_VALUE; break
                    :: else -> at++
                    fi
                }
#endif
                :: atomic { at == CAPACITY -> break }
                od;
                if
                :: atomic { at == CAPACITY -> at = 0; break } /* full */
                :: else
                fi;
#ifdef RESERVE_IN_TWO_STEPS
                cells[at] = value; /* who has it, told afterwards */
#endif
                /* is_open, its two loads; step reserve.recheck */
                won = (death[NODE] == ALIVE);
                atomic {
                    won = (won && load_state == OPEN && load_generation == gen);
#ifdef NO_RECHECK
                    won = 1;
#endif
                    if
                    :: won ->
                        believed[me - 1] = value;
                        believed_of[me - 1] = gen;
                        check_capacity();
                        /* Who passes the recheck has reserved before a drain began to look. */
                        assert(drained != gen || generation[NODE] != gen || !lives(NODE)
                               || !lives(me)); /* DRAINED */
                        /* send: it may arrive at any time from here on, or never */
                        entry = (life * ROUTERS + me - 1) * ATTEMPTS + attempt;
                        token[entry] = value;
                        token_cell[entry] = at;
                        token_generation[entry] = gen;
                        awaited[me - 1] = entry + 1;
                        entry = 0;
                        gen = 0;
                        attempt++
                    :: else
                    fi
                };
                if
                :: atomic { !won -> free_cas(at, value, me, won); won = 0 } /* not open: back with it */
                :: atomic {
                    won ->
                    if
                    :: reply[me - 1] == DONE -> won = 0
                    :: reply[me - 1] == REFUSED
                    :: won = 0 /* has waited long enough */
                    fi;
                    reply[me - 1] = 0;
                    awaited[me - 1] = 0;
#ifdef PLAIN_STORE_FREE
                    free_plain(at, me);
                    won = 1;
#else
                    if /* release: step free.cas */
                    :: won -> free_cas(at, value, me, won); won = 1
                    :: else -> free_cas(at, value, me, won)
                    fi;
#endif
#ifdef RETRY_ANYWAY
                    won = 1;
#endif
                    if
                    :: believed[me - 1] == value -> believed[me - 1] = 0
                    :: else
                    fi
                }
                fi;
                atomic {
                    at = 0;
                    value = 0;
                    gen = 0;
                    if
                    :: won -> won = 0
                    :: else -> break
                    fi
                }
            :: break /* has had enough */
            od;
            give_back(me)
        } unless { stopped[me] };
        atomic {
            i = 0; seen = 0; k = 0; n = 0; at = 0; value = 0; gen = 0; entry = 0; won = 0;
            op = 0;
            attempt = 0;
            believed[me - 1] = 0;
            reply[me - 1] = 0;
            awaited[me - 1] = 0;
            life++
        };
        atomic { lock[me] == UNLOCKED -> stopped[me] = 0 }
    :: else -> break
    od;
    ended++
}

#define ROUTER_OF(entry) (((entry) / ATTEMPTS) % ROUTERS)
inline send_reply(to, what) {
    if
    :: awaited[ROUTER_OF(to)] == to + 1 -> reply[ROUTER_OF(to)] = what
    :: else
    fi
}

/* Request.end: free_cell, then the reply */
inline finish(at) {
    running[at] = 0;
    free_cas(at, held[at], OWNER(held[at]), won); /* step free.cas */
    won = 0;
    send_reply(held_entry[at], DONE);
    held[at] = 0;
    held_entry[at] = 0
}

proctype Node() {
    byte i, seen, k, n;
    byte entry, life, value, op, open;
    bool won;
    byte held[CELLS]; /* values of the requests that run */
    byte held_entry[CELLS];
    do
    :: life < NODE_LIVES ->
        {
            claim(NODE);
            do
            :: atomic {
                op < 3 -> /* adopt: a request that has arrived */
                if
                :: token[0] != 0 -> entry = 0
#if TOKENS > 1
                :: token[1] != 0 -> entry = 1
#endif
#if TOKENS > 2
                :: token[2] != 0 -> entry = 2
#endif
#if TOKENS > 3
                :: token[3] != 0 -> entry = 3
#endif
#if TOKENS > 4
                :: token[4] != 0 -> entry = 4
#endif
#if TOKENS > 5
                :: token[5] != 0 -> entry = 5
#endif
#if TOKENS > 6
                :: token[6] != 0 -> entry = 6
#endif
#if TOKENS > 7
                :: token[7] != 0 -> entry = 7
#endif
                fi;
                seen = token[entry];
                i = token_cell[entry];
                won = (token_generation[entry] == generation[NODE]); /* find_cell */
                token[entry] = 0;
                token_cell[entry] = 0;
                token_generation[entry] = 0;
#ifdef ADOPT_KEEPS_OWNER
                value = (seen & 63) | RUNNING << 6;
#else
                value = CELL(RUNNING, NODE, generation[NODE], op + 1);
#endif
#ifndef ADOPT_WITHOUT_LOOKING
                won = (won && cells[i] == seen); /* step adopt.cas */
#endif
#ifdef ADOPT_WITHOUT_CAS
               };
                atomic { /* others between the look and the store */
#endif
                    if
                    :: won -> /* adopted: from here on it counts as executed */
                        cells[i] = value;
                        forget(seen);
                        op++;
                        held[i] = value;
                        held_entry[i] = entry;
                        running[i] = value;
                        executed[entry / ATTEMPTS] = executed[entry / ATTEMPTS] + 1;
                        assert(executed[entry / ATTEMPTS] <= 1);         /* ONCE */
                        assert(drained != generation[NODE] || !lives(NODE)); /* DRAINED */
                        check_capacity()
                    :: else -> send_reply(entry, REFUSED)
                    fi;
                    seen = 0; i = 0; value = 0; won = 0; entry = 0
                }
            :: atomic { held[0] != 0 -> finish(0) }
#if CELLS > 1
            :: atomic { held[1] != 0 -> finish(1) }
#endif
#ifndef NO_DRAIN
            :: atomic { load_state == OPEN -> load_state = DRAINING } /* step drain.state */
            :: load_state == DRAINING && drained != generation[NODE] -> /* inflight */
                do
                :: atomic { i < CELLS -> open = open + (cells[i] != 0); i++ }
                :: atomic {
                    i == CELLS ->
                    if
                    :: open == 0 -> drained = generation[NODE]
                    :: else
                    fi;
                    i = 0;
                    open = 0;
                    break
                }
                od
#endif
            :: break /* leave */
            od;
            atomic { load_state = SHUTDOWN; running[0] = 0; running[CELLS - 1] = 0 };
            give_back(NODE)
        } unless { stopped[NODE] };
        atomic {
            i = 0; seen = 0; k = 0; n = 0; entry = 0; value = 0; op = 0; open = 0; won = 0;
            held[0] = 0; held[CELLS - 1] = 0; running[0] = 0; running[CELLS - 1] = 0;
            held_entry[0] = 0; held_entry[CELLS - 1] = 0;
            life++
        };
        atomic { lock[NODE] == UNLOCKED -> stopped[NODE] = 0 }
    :: else -> break
    od;
    ended++
}

#define OBSERVER 3 /* the slot of nobody */

/* reap_all, of one slot: an option of a loop */
#ifdef REAP_ON_LATE_BEAT
#define may_reap(slot) (ended < SLOTS && live[slot]) /* the lock is not asked */
#else
#define may_reap(slot) (ended < SLOTS && live[slot] && lock[slot] == UNLOCKED)
#endif
#define reap(slot) \
    atomic { may_reap(slot) -> lock[slot] = REAPING }; \
    clear_slot(slot, OBSERVER); \
    lock[slot] = UNLOCKED

/* Anybody: sweeps and reaps whenever he likes. */
proctype Observer() {
    byte i, seen, step, k;
    bool won;
    byte gone[SLOTS]; /* generations that were dead when the sweep began */
    do
    :: ended < SLOTS ->
        {
            do
            :: atomic {
                ended < SLOTS -> /* sweep */
                do
                :: k < SLOTS ->
                    if
                    :: death[k] == MARKED && (stopped[k] || lock[k] == UNLOCKED) ->
                        gone[k] = generation[k]
                    :: else
                    fi;
                    k++
                :: else -> break
                od;
                k = 0
               };
                sweep_row(OBSERVER);
                atomic {
                    do
                    :: k < CELLS ->
                        assert(cells[k] == 0 || STATE(cells[k]) == 3 || gone[OWNER(cells[k])] == 0
                               || GENERATION(cells[k]) != gone[OWNER(cells[k])]); /* SWEPT */
                        k++
                    :: else -> break
                    od;
                    k = 0;
                    do
                    :: k < SLOTS -> gone[k] = 0; k++
                    :: else -> break
                    od;
                    k = 0
                }
            :: reap(NODE)
            :: reap(1)
#if ROUTERS > 1
            :: reap(2)
#endif
            :: ended == SLOTS -> break
            od
        } unless { observer_stopped };
        atomic { /* if that was a death: the kernel frees what he had locked */
            observer_stopped = 0;
            i = 0; seen = 0; step = 0; won = 0; k = 0;
            do
            :: k < SLOTS ->
                gone[k] = 0;
                if
                :: lock[k] == REAPING -> lock[k] = UNLOCKED
                :: else
                fi;
                k++
            :: else -> break
            od;
            k = 0
        }
    :: ended == SLOTS -> break
    od;
    /* Everybody has ended: what is left is reaped, and then nothing is left. */
    atomic {
        do
        :: k < SLOTS ->
            if
            :: live[k] -> clear_slot(k, OBSERVER)
            :: else
            fi;
            k++
        :: else -> break
        od;
        sweep_row(OBSERVER);
        k = 0;
        do
        :: k < CELLS -> assert(cells[k] == 0); k++ /* LEAKED */
        :: else -> break
        od
    }
}

/* SIGKILL, to anybody, at any time. Who leaves meanwhile has been faster. */
#define running_process(slot) (lock[slot] == OWNED && !stopped[slot])

inline finish_kill(slot) {
    atomic {
        if
        :: running_process(slot) -> stopped[slot] = 1
        :: else
        fi
    };
    atomic {
        if
        :: lock[slot] == OWNED && stopped[slot] ->
            if
            :: death[slot] == ALIVE -> death[slot] = MARKED
            :: else
            fi;
            lock[slot] = UNLOCKED
        :: else
        fi;
        victim = 0
    }
}

/* options of a choice: marked first, or stopped first */
#define kill(slot) \
    :: atomic { running_process(slot) && death[slot] == ALIVE -> death[slot] = MARKED; victim = slot } \
    :: atomic { running_process(slot) -> stopped[slot] = 1; victim = slot }

proctype Killer() {
    byte done, victim;
    do
    :: done < KILLS ->
        if
        kill(NODE)
        kill(1)
#if ROUTERS > 1 && KILLS > 1 /* one death: the routers are alike */
        kill(2)
#endif
#ifdef KILL_OBSERVER
        :: atomic { ended < SLOTS -> observer_stopped = 1; victim = OBSERVER }
#endif
        :: atomic { done = KILLS - 1; victim = OBSERVER } /* no more */
        fi;
        if
        :: victim != OBSERVER -> finish_kill(victim)
        :: else -> victim = 0
        fi;
        done++
    :: else -> break
    od
}

init {
    atomic {
        run Node();
        run Router(1);
#if ROUTERS > 1
        run Router(2);
#endif
        run Observer();
        run Killer()
    }
}
