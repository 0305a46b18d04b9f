"""The measurements on a GPU: `bash bench/gpu/run.sh`, docs/gpu.md."""
