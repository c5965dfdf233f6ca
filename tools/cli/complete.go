package cli

import "github.com/spf13/cobra"

// Completes makes a shell call offer for the value of a flag of cmd.
func Completes(cmd *cobra.Command, flag string, offer cobra.CompletionFunc) {
	// An error means that cmd has no such flag, or that offers for it are made already.
	if err := cmd.RegisterFlagCompletionFunc(flag, offer); err != nil {
		panic(err)
	}
}

// FixedValues makes a shell offer values for a flag of cmd.
func FixedValues(cmd *cobra.Command, flag string, values ...string) {
	Completes(cmd, flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}
