"""Runnable Triton files; `attnc.codegen.render` fills their holes."""
