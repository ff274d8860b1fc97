"""Search over the knobs of forms: problems, trials, records, measurement."""
