/* What test_kernels_amx.py and test_kernels_avxvnni.py call of an instruction set, SOFT_ISA. */
size_t soft_act_bytes(int fmt, long cols) { return mer_act_bytes(fmt, cols); }

void soft_prepare(int fmt, const float *x, void *act, long cols) { mer_prepare(&SOFT_ISA, fmt, x, act, cols); }

void soft_matmul(int fmt, const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, float *y,
                 long y_stride) {
    SOFT_ISA.matmul[fmt](w, cols, r0, r1, acts, n_tok, y, y_stride);
}
