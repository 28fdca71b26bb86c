"""What this machine is, asked of NVML and sysfs, written down raw, and read as a cluster."""
