"""The response cache: exact by default, semantic behind a switch."""

from fastattn.serve.cache.cache import ResponseCache as ResponseCache
from fastattn.serve.cache.cache import build_cache as build_cache
from fastattn.serve.cache.config import CacheConfig as CacheConfig
from fastattn.serve.cache.config import SemanticConfig as SemanticConfig
