"""Who said what: keys, signed statements, private audits, and evidence. Pure: neither Lightning nor DeepSpeed, and no processes."""
