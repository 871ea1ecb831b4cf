/* TestU01 on the addressed generator of qpo_sim.random: Threefry-2x32, key from (seed, stream), counter from the path
 * number and the packed (step, slot).
 *
 *   battery run    ORDER WORDS BITS ROUNDS BATTERY [N_BITS]   one "pvalue" line per test
 *   battery dump   ORDER WORDS BITS ROUNDS N                  the first N words, one hexadecimal number a line
 *
 * ORDER lists the parts of an address that run, the fastest first, as AXIS[*STRIDE][:COUNT], and those that start
 * elsewhere than at 0 as AXIS=VALUE. An axis may run twice: "seed=1,path:4096,step:365,path*4096" is 4096 paths at a
 * step, step after step, block of paths after block of paths. WORDS is both, first or second; BITS is plain or reversed;
 * BATTERY is smallcrush, crush, bigcrush, rabbit or alphabit, and the last two take N_BITS bits. */

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bbattery.h"
#include "swrite.h"
#include "unif01.h"

enum { SEED, STREAM, PATH, STEP, SLOT, N_AXES };
enum { SLOT_BITS = 12, MAX_DIGITS = 8, BLOCKS = 512 };

static const char *const AXES[N_AXES] = {"seed", "stream", "path", "step", "slot"};
static const uint64_t LIMIT[N_AXES] = {UINT64_MAX, UINT32_MAX, UINT32_MAX, (UINT32_C(1) << (32 - SLOT_BITS)) - 1,
                                       (UINT32_C(1) << SLOT_BITS) - 1};
static const unsigned ROTATION[8] = {13, 15, 26, 6, 17, 29, 16, 24};

typedef struct {
    int axis;
    uint64_t stride, count, position;
} Digit;

static uint64_t address[N_AXES];
static Digit digit[MAX_DIGITS];
static int n_digits;
static int n_rounds;
static bool use_first, use_second, is_reversed;
static uint32_t words[2 * BLOCKS];
static size_t n_words, next_word;

static void fail(const char *what, const char *value) {
    fprintf(stderr, "battery: %s: %s\n", what, value);
    exit(2);
}

/* n blocks at once, round by round, so that the compiler can vectorise over the blocks. */
static void threefry(uint32_t *x0, uint32_t *x1, const uint32_t *k0, const uint32_t *k1, size_t n, int rounds) {
    uint32_t k2[BLOCKS];
    const uint32_t *schedule[3] = {k0, k1, k2};
    for (size_t i = 0; i < n; i++) {
        k2[i] = k0[i] ^ k1[i] ^ UINT32_C(0x1BD11BDA);
        x0[i] += k0[i];
        x1[i] += k1[i];
    }
    for (int r = 0; r < rounds; r++) {
        const unsigned shift = ROTATION[r % 8];
        for (size_t i = 0; i < n; i++) {
            x0[i] += x1[i];
            x1[i] = ((x1[i] << shift) | (x1[i] >> (32 - shift))) ^ x0[i];
        }
        if (r % 4 == 3) {
            const uint32_t j = (uint32_t)r / 4 + 1;
            const uint32_t *a = schedule[j % 3], *b = schedule[(j + 1) % 3];
            for (size_t i = 0; i < n; i++) {
                x0[i] += a[i];
                x1[i] += b[i] + j;
            }
        }
    }
}

static void advance(void) {
    for (int d = 0; d < n_digits; d++) {
        Digit *g = &digit[d];
        address[g->axis] += g->stride;
        if (++g->position < g->count) return;
        address[g->axis] -= g->stride * g->count;
        g->position = 0;
    }
    fail("the order has no address left", "");
}

static uint32_t reversed(uint32_t x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0F0F0F0Fu) | (x & 0x0F0F0F0Fu) << 4;
    x = (x >> 8 & 0x00FF00FFu) | (x & 0x00FF00FFu) << 8;
    return x >> 16 | x << 16;
}

static void refill(void) {
    static uint32_t x0[BLOCKS], x1[BLOCKS], k0[BLOCKS], k1[BLOCKS], seed_high[BLOCKS], seed_low[BLOCKS];
    for (size_t i = 0; i < BLOCKS; i++) {
        seed_high[i] = (uint32_t)(address[SEED] >> 32);
        seed_low[i] = (uint32_t)address[SEED];
        k0[i] = (uint32_t)address[STREAM];
        k1[i] = 0;
        x0[i] = (uint32_t)address[PATH];
        x1[i] = ((uint32_t)address[STEP] << SLOT_BITS) + (uint32_t)address[SLOT];
        advance();
    }
    /* The key is always made with all 20 rounds: a weakened cipher is to be judged as a function of its counter. */
    threefry(k0, k1, seed_high, seed_low, BLOCKS, 20);
    threefry(x0, x1, k0, k1, BLOCKS, n_rounds);
    n_words = next_word = 0;
    for (size_t i = 0; i < BLOCKS; i++) {
        if (use_first) words[n_words++] = is_reversed ? reversed(x0[i]) : x0[i];
        if (use_second) words[n_words++] = is_reversed ? reversed(x1[i]) : x1[i];
    }
}

static unsigned int draw(void) {
    if (next_word == n_words) refill();
    return words[next_word++];
}

static uint64_t number(const char **text) {
    char *end;
    const uint64_t value = strtoull(*text, &end, 10);
    if (end == *text) fail("a number is missing", *text);
    *text = end;
    return value;
}

static void read_order(const char *text) {
    while (*text) {
        int axis = 0;
        while (axis < N_AXES && strncmp(text, AXES[axis], strlen(AXES[axis])) != 0) axis++;
        if (axis == N_AXES) fail("unknown part of an address", text);
        text += strlen(AXES[axis]);
        if (*text == '=') {
            text++;
            address[axis] = number(&text);
        } else {
            if (n_digits == MAX_DIGITS) fail("too many parts", text);
            Digit *g = &digit[n_digits++];
            *g = (Digit){.axis = axis, .stride = 1};
            if (*text == '*') text++, g->stride = number(&text);
            if (*text == ':') text++, g->count = number(&text);
            /* Without a count it runs to the end of the axis; a full 64-bit seed axis does not end. */
            if (g->count == 0) g->count = (LIMIT[axis] - address[axis]) / g->stride + (axis != SEED);
        }
        if (*text == ',') text++;
        else if (*text) fail("unreadable order", text);
    }
    if (n_digits == 0) fail("nothing runs in the order", "");
}

int main(int argc, char **argv) {
    if (argc < 7) fail("usage", "battery run|dump ORDER both|first|second plain|reversed ROUNDS BATTERY|N [N_BITS]");
    const char *mode = argv[1], *which = argv[3], *battery = argv[6];
    read_order(argv[2]);
    use_first = strcmp(which, "second") != 0;
    use_second = strcmp(which, "first") != 0;
    is_reversed = strcmp(argv[4], "reversed") == 0;
    n_rounds = atoi(argv[5]);

    if (strcmp(mode, "dump") == 0) {
        for (long n = atol(battery); n > 0; n--) printf("%08x\n", draw());
        return 0;
    }

    const double n_bits = argc > 7 ? atof(argv[7]) : 0.0;
    swrite_Basic = FALSE;
    unif01_Gen *generator = unif01_CreateExternGenBits("qpo_sim", draw);
    if (strcmp(battery, "smallcrush") == 0) bbattery_SmallCrush(generator);
    else if (strcmp(battery, "crush") == 0) bbattery_Crush(generator);
    else if (strcmp(battery, "bigcrush") == 0) bbattery_BigCrush(generator);
    else if (strcmp(battery, "rabbit") == 0) bbattery_Rabbit(generator, n_bits);
    else if (strcmp(battery, "alphabit") == 0) bbattery_Alphabit(generator, n_bits, 0, 32);
    else fail("unknown battery", battery);
    for (int i = 0; i < bbattery_NTests; i++)
        if (bbattery_pVal[i] >= 0.0) printf("pvalue\t%.17g\t%s\n", bbattery_pVal[i], bbattery_TestNames[i]);
    unif01_DeleteExternGenBits(generator);
    return 0;
}
