/* Masks of the n largest magnitudes in groups of M, which lie one after the other. M and REAL are set by the compiler's
   command, so the loops over a group are unrolled. Ties go to the lowest index, and NaN is the smallest magnitude. */
#include <tgmath.h>
enum { BLOCK = 64 };

static void mask_block(const REAL *restrict weight, REAL *restrict mask, int groups, REAL n) {
    REAL magnitude[M][BLOCK], rank[M][BLOCK];
    for (int g = 0; g < groups; g++)
        for (int k = 0; k < M; k++) {
            REAL x = fabs(weight[g * M + k]);
            magnitude[k][g] = x >= 0 ? x : -1;
            rank[k][g] = M - 1 - k; /* as if all later ones were larger */
        }
    for (int i = 0; i < M; i++) {
        for (int j = i + 1; j < M; j++)
            for (int g = 0; g < groups; g++) {
                REAL wins = magnitude[i][g] >= magnitude[j][g];
                rank[i][g] -= wins;
                rank[j][g] += wins;
            }
        for (int g = 0; g < groups; g++) rank[i][g] = rank[i][g] < n; /* i has met all others */
    }
    for (int g = 0; g < groups; g++)
        for (int k = 0; k < M; k++) mask[g * M + k] = rank[k][g];
}

void nm_mask(const REAL *weight, REAL *mask, long long groups, int n) {
    for (; groups > 0; groups -= BLOCK, weight += BLOCK * M, mask += BLOCK * M)
        mask_block(weight, mask, groups < BLOCK ? groups : BLOCK, n);
}
