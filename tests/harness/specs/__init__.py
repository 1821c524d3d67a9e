"""The table of operators; the tests, the sanitizer runs and the GPU checks are made from it."""

from tests.harness.specs.attention import ATTENTION
from tests.harness.specs.elementwise import ELEMENTWISE
from tests.harness.specs.kv_cache import KV_CACHE
from tests.harness.specs.linear import LINEAR
from tests.harness.specs.quantized import QUANTIZED
from tests.harness.specs.sampling import SAMPLING

SPECS = (*ELEMENTWISE, *LINEAR, *QUANTIZED, *KV_CACHE, *ATTENTION, *SAMPLING)
