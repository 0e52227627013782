"""Settings shared by all tests, made before jax wakes up."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs are tiny and compiling them is most of the time; without LLVM's optimizations it takes a third. What XLA
# itself does to a program (fusion, partitioning, collectives) stays. XLA_FLAGS="" tests optimized machine code.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Tests compile the same small programs again and again; one cache for the whole run halves their time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "iha_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
