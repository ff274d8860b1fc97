"""From a captured graph to a rewritten one: capture, normalize, masks, lift, choose, rewrite, check."""
