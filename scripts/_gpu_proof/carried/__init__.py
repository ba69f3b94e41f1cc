"""What a GPU host without network lacks, collected where there is one."""
