"""Files to read: in a folder on this machine or elsewhere, by offset, and compared with what a record promises."""
