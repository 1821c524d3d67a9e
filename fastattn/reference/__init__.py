"""Every operator in a dozen lines of torch: what runs on the CPU, what tests compare with, and the definition to read.

Arguments are taken as valid; `fastattn.ops` has checked them. All arithmetic is fp32 and is rounded once, at the end.
"""
