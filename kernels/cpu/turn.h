// The transposition of words that a panel's rows need. Included by the paths that define load_rows, words_of, pairs_of and
// quads_of for their vectors; in those of 512 bits it works in either half (rows i and i + 8 lie side by side).

// Rows as load_rows reads them to 8 vectors: word j of every row.
MM_TARGET inline void turn(const uint8_t *from, int64_t stride, int64_t rows, I (&to)[8]) {
    I r[8], s[8];
    load_rows(from, stride, rows, r);
    for (int i = 0; i < 4; ++i) {
        s[2 * i] = words_of<0>(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = words_of<1>(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            r[4 * i + 2 * j] = pairs_of<0>(s[4 * i + j], s[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = pairs_of<1>(s[4 * i + j], s[4 * i + 2 + j]);
        }
    for (int j = 0; j < 4; ++j) {
        to[j] = quads_of<0>(r[j], r[j + 4]);
        to[j + 4] = quads_of<1>(r[j], r[j + 4]);
    }
}
