#include "attention/schema.h"

VDIT_LIBRARY(VDIT_OP_NAMESPACE, m) { vdit::define_attention_schemas(m); }
