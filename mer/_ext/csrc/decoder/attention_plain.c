/* Attention for every CPU. */
#define LANES 4
#define FUNCTION(NAME) NAME##_plain
#include "attend.h"
