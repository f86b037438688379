"""What only the repository needs: generated tables, the GPU session, packing, set-up."""
